// A pool of threads that sleep when idle. It grows to what is asked for and lives as long as the process.
#pragma once
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

class Pool {
 public:
  // Runs `work` on the caller and on `helpers` more threads; returns when all have finished. While another caller
  // has the pool, `work` runs on the caller alone: it must take its share from a common counter.
  static void run(int64_t helpers, const std::function<void()>& work) {
    if (helpers <= 0 || busy_.test_and_set(std::memory_order_acquire)) return work();
    instance().share(helpers, work);
    busy_.clear(std::memory_order_release);
  }

 private:
  static Pool& instance() {
    // After a fork only the forking thread exists, so the child begins with a pool of its own. Neither is ever
    // destroyed: its threads may sleep in it until the process ends.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      current_ = new Pool;
      busy_.clear();
    });
    (void)registered;
    if (!current_) current_ = new Pool;
    return *current_;
  }

  void share(int64_t helpers, const std::function<void()>& work) {
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      for (; threads_ < helpers; ++threads_) std::thread(&Pool::serve, this, threads_, round_).detach();
    } catch (const std::system_error&) {
      helpers = threads_;  // no more threads are to be had: those that are here do the work
    }
    work_ = &work;
    wanted_ = pending_ = helpers;
    ++round_;
    lock.unlock();
    wake_.notify_all();
    work();
    lock.lock();
    done_.wait(lock, [this] { return pending_ == 0; });
  }

  void serve(int64_t index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (index >= wanted_) continue;
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  int64_t threads_ = 0, wanted_ = 0, pending_ = 0;
  uint64_t round_ = 0;

  static inline Pool* current_ = nullptr;
  static inline std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};
