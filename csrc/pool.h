// Threads that wait for work. Where the process has OpenMP already, as with PyTorch, they are OpenMP's: after work of
// PyTorch's they spin for some milliseconds, and other threads would have to share the cores with them. Elsewhere, and
// after a fork, which OpenMP does not survive, it is a pool of our own, which sleeps when idle, grows to what is asked for
// and lives as long as the process.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready()` or for about 50 µs, which is what falling asleep and waking up again would cost.
template <typename Ready>
bool spin(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  // Runs `work` on the caller and on `helpers` more threads; returns when all have finished. While another caller
  // has the pool, `work` runs on the caller alone: it must take its share from a common counter.
  static void run(int64_t helpers, const std::function<void()>& work) {
    if (helpers <= 0 || busy_.test_and_set(std::memory_order_acquire)) return work();
    if (const OpenMp* openmp = OpenMp::here())
      openmp->parallel([](void* given) { (*static_cast<const std::function<void()>*>(given))(); },
                       const_cast<std::function<void()>*>(&work),
                       static_cast<unsigned>(std::min<int64_t>(helpers + 1, openmp->limit())), 0);
    else
      instance().share(helpers, work);
    busy_.clear(std::memory_order_release);
  }

 private:
  // Entries of GNU's OpenMP library, which others provide too.
  struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*limit)();  // it ends the process where more threads are not to be had

    static const OpenMp* here() {
      watch_forks();
      static const OpenMp found = {reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                                   reinterpret_cast<decltype(limit)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"))};
      return forked_ || !found.parallel || !found.limit ? nullptr : &found;
    }
  };

  static void watch_forks() {
    // After a fork only the forking thread exists, so the child begins with a pool of its own. Neither is ever
    // destroyed: its threads may sleep in it until the process ends.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      forked_ = true;
      current_ = new Pool;
      busy_.clear();
    });
    (void)registered;
  }

  static Pool& instance() {
    if (!current_) current_ = new Pool;
    return *current_;
  }

  void share(int64_t helpers, const std::function<void()>& work) {
    try {
      for (; threads_ < helpers; ++threads_) std::thread(&Pool::serve, this, threads_, round_.load()).detach();
    } catch (const std::system_error&) {
      helpers = threads_;  // no more threads are to be had: those that are here do the work
    }
    work_ = &work;
    wanted_ = helpers;
    pending_.store(threads_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work();
    // A helper that has not finished yet was taken off its core: give it ours.
    const auto finished = [this] { return pending_.load(std::memory_order_acquire) == 0; };
    while (!spin(finished)) sched_yield();
  }

  void serve(int64_t index, uint64_t seen) {
    for (;;) {
      const auto called = [&] { return round_.load(std::memory_order_acquire) != seen; };
      if (!spin(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      ++seen;  // no round begins before every thread has answered the one before
      if (index < wanted_) (*work_)();
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void()>* work_ = nullptr;
  int64_t threads_ = 0, wanted_ = 0;
  std::atomic<int64_t> pending_{0};
  std::atomic<uint64_t> round_{0};

  static inline bool forked_ = false;
  static inline Pool* current_ = nullptr;
  static inline std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};
