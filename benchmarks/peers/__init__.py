"""What ``bench generate`` measures, each in a process of its own: this package's methods and other engines."""
