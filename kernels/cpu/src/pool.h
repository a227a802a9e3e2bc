// A small work-claiming thread pool. Not OpenMP: a second OpenMP runtime beside torch's, or any other busy process,
// slows every barrier of it by two orders of magnitude, since each thread then waits for all of its fellows.
//
// Here nobody waits for a thread that has not begun. A job is a number of chunks; the calling thread claims chunks like
// any worker and, when none is left, waits only for those that a worker has claimed. A worker that the system does not
// run costs its share of the speed and nothing more.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Everything else is hidden, so that no symbol of ours meets one of another library in the process.
#define QS_EXPORT extern "C" __attribute__((visibility("default")))

namespace quantspec {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Flush-to-zero and rounding mode belong to a thread (torch.set_flush_denormal sets the caller's alone). Workers take
// those of the caller: which thread computes a row must not show in its bits.
#if defined(__x86_64__)
inline uint32_t float_mode() { return _mm_getcsr(); }
inline void set_float_mode(uint32_t mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
inline uint32_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return static_cast<uint32_t>(mode);
}
inline void set_float_mode(uint32_t mode) { asm volatile("msr fpcr, %0" : : "r"(static_cast<uint64_t>(mode))); }
#else
inline uint32_t float_mode() { return 0; }
inline void set_float_mode(uint32_t) {}
#endif

// Polls for about 60 us, longer than the gaps between the operations of one step, and says whether `ready` came true.
template <class Ready>
bool spin(Ready&& ready) {
  using Clock = std::chrono::steady_clock;
  for (auto end = Clock::time_point::max();;) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
    const auto now = Clock::now();
    if (now > end) return false;
    end = std::min(end, now + std::chrono::microseconds(60));
  }
}

class Pool {
 public:
  using Run = void (*)(void* body, int chunk);

  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  // Runs all chunks and returns true; or returns false, having run none, where the pool serves another job (of
  // another Python thread, or the one that this call is nested in) or is retired. Throws if a chunk did.
  bool run(int chunks, Run run, void* body) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    start_workers();
    run_ = run, body_ = body, chunks_ = chunks, mode_ = float_mode();
    pending_.store(chunks, std::memory_order_relaxed);
    const bool published = pass(0, chunks);
    bool failed = false;
    if (published) {
      if (sleepers_.load() > 0) wake(chunks - 1);
      while (claim()) {
      }
      while (!spin([&] { return pending_.load(std::memory_order_acquire) == 0; })) sched_yield();
      if (retired_.load()) dismiss();
      failed = failed_.exchange(false);
    }
    busy_.store(false, std::memory_order_release);
    if (failed) throw std::bad_alloc();
    return published;
  }

  // Lets the workers go: now, or at the end of the job that they are in. The object itself stays: see `current`.
  void retire() {
    retired_.store(true);
    dismiss();
  }

 private:
  static constexpr int32_t kDismissed = -1;

  bool pass(int32_t from, int32_t to) { return left_.compare_exchange_strong(from, to); }

  void dismiss() {
    if (pass(0, kDismissed)) wake(INT32_MAX);
  }

  // Claims and runs one chunk. A number of the job is not needed in the counter: a claim that succeeds is one on the
  // job of this moment, whose fields are read only after it and stay until its last claimed chunk is reported.
  bool claim() {
    int32_t left = left_.load(std::memory_order_relaxed);
    do {
      if (left <= 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_relaxed));
    set_float_mode(mode_);
    try {
      run_(body_, chunks_ - left);
    } catch (const std::bad_alloc&) {  // no other exception is thrown here
      failed_.store(true);
    }
    pending_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  static void* work(void* pool) {
    Pool& self = *static_cast<Pool*>(pool);
    while (self.left_.load() != kDismissed) {
      while (self.claim()) {
      }
      if (!spin([&] { return self.left_.load(std::memory_order_relaxed) != 0; })) self.sleep();
    }
    return nullptr;
  }

  // A system that refuses a thread leaves us with fewer. Signals are for Python's threads.
  void start_workers() {
    if (started_) return;
    started_ = true;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < threads_; ++i) {
      pthread_t thread;
      if (pthread_create(&thread, nullptr, work, this) != 0) break;
      pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Sleepers are counted before the counter is read again, and the caller stores it before it reads their number
  // (both sequentially consistent), so that one of the two always sees the other.
#if defined(__linux__)
  void sleep() {
    sleepers_.fetch_add(1);
    syscall(SYS_futex, &left_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
  }
  void wake(int count) { syscall(SYS_futex, &left_, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }
#else
  void sleep() {
    pthread_mutex_lock(&mutex_);
    sleepers_.fetch_add(1);
    while (left_.load() == 0) pthread_cond_wait(&condition_, &mutex_);
    sleepers_.fetch_sub(1);
    pthread_mutex_unlock(&mutex_);
  }
  void wake(int) {
    pthread_mutex_lock(&mutex_);
    pthread_cond_broadcast(&condition_);
    pthread_mutex_unlock(&mutex_);
  }
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
#endif

  // The counter, also the futex, shares a cache line with the job that a claim reads next.
  alignas(64) std::atomic<int32_t> left_{0};
  int chunks_ = 0;
  Run run_ = nullptr;
  void* body_ = nullptr;
  uint32_t mode_ = 0;
  alignas(64) std::atomic<int32_t> pending_{0};
  alignas(64) std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> busy_{false};
  std::atomic<bool> retired_{false};
  std::atomic<bool> failed_{false};
  bool started_ = false;
  const int threads_;
};

inline int available_cores() {
  int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
#if defined(__linux__)
  cpu_set_t mask;  // what a container or taskset leaves us
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) cores = CPU_COUNT(&mask);
#endif
  return cores < 1 ? 1 : cores;
}

inline std::atomic<int> wanted{0};  // 0: as many as there are cores

inline int num_threads() {
  const int count = wanted.load();
  if (count > 0) return count;
  static const int cores = available_cores();
  return cores;
}

// Counts below 1 stand for as many threads as there are cores. May be called at any time, also while jobs run.
inline void set_num_threads(int count) { wanted.store(std::min(count, 1024)); }

// The pool of this process, made on demand. It is never deleted: detached workers may outlive the interpreter's last
// statement, and must not find a destroyed object. So a change of the thread count leaves a few cache lines behind.
inline std::atomic<Pool*> current{nullptr};

inline Pool* pool() {
  // A forked child has none of the workers, and the counters as some other thread left them.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
  Pool* known = current.load();
  while (!known || known->threads() != num_threads()) {
    Pool* fresh = new (std::nothrow) Pool(num_threads());
    if (current.compare_exchange_strong(known, fresh)) {
      if (known) known->retire();
      return fresh;
    }
    delete fresh;  // another thread was quicker; this one has no workers yet
  }
  return known;
}

inline thread_local bool alone = false;

// While one lives, and if `wanted`, its thread runs all chunks itself: for calls of a few microseconds, which waiting
// for a worker that the system has just put aside would make a hundred times as long.
class Alone {
 public:
  explicit Alone(bool wanted) : before_(alone) { alone = before_ || wanted; }
  ~Alone() { alone = before_; }
  Alone(const Alone&) = delete;

 private:
  const bool before_;
};

// Calls body(chunk) once for each chunk in [0, chunks), on this thread and on workers, and returns when all are done.
// Any thread may call it at any time; a call that finds the pool taken runs its chunks itself. Where a chunk found no
// memory (std::bad_alloc), so does this.
template <class F>
void parallel_for(int chunks, F&& body) {
  using Body = std::remove_reference_t<F>;
  if (chunks > 1 && !alone && num_threads() > 1) {
    const auto run = [](void* erased, int chunk) { (*static_cast<Body*>(erased))(chunk); };
    Pool* shared = pool();
    if (shared && shared->run(chunks, run, const_cast<void*>(static_cast<const void*>(&body)))) return;
  }
  for (int chunk = 0; chunk < chunks; ++chunk) body(chunk);
}

// What a call from Python returns: 0, or 1 where there was no memory. No exception may pass.
template <class F>
int status_of(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace quantspec

QS_EXPORT void qs_set_threads(int count) { quantspec::set_num_threads(count); }
QS_EXPORT int qs_threads() { return quantspec::num_threads(); }

// For tests: counts[chunk * inner + i] += 1 in a parallel_for over i nested in one over chunks, each entry after
// `spins` pauses; workers[chunk] gets a number that stands for the thread.
QS_EXPORT void qs_pool_test(int chunks, int inner, int spins, int32_t* counts, int64_t* workers) {
  static thread_local char here;
  quantspec::parallel_for(chunks, [=](int chunk) {
    workers[chunk] = reinterpret_cast<intptr_t>(&here);
    quantspec::parallel_for(inner, [=](int i) {
      for (int k = 0; k < spins; ++k) quantspec::relax();
      counts[static_cast<int64_t>(chunk) * inner + i] += 1;
    });
  });
}

// For tests: the status of a parallel_for one of whose chunks finds no memory.
QS_EXPORT int qs_failure_test(int chunks, int failing) {
  return quantspec::status_of([=] {
    quantspec::parallel_for(chunks, [=](int chunk) {
      if (chunk == failing) throw std::bad_alloc();
    });
  });
}
