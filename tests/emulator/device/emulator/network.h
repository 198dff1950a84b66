// network.h: what NVSHMEM has taken and not yet delivered. A thread of its own delivers it, late and in any order that
// a fence does not forbid, and reads what is sent only then: as a network does, and copies within a host do not.
#pragma once

#include <vector>

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

namespace emulator {

struct Message {
    char* to;
    const char* from;
    uint64_t num_bytes;
    void* word;  // written behind the bytes
    int word_bytes;  // 8 or 4
    uint64_t value;
    int pe;
    uint64_t epoch;  // fences before it
};

class Network {
  public:
    // One for the process, as NVSHMEM is one, whatever module a kernel is in; each of those has this code, and the same layout.
    static Network& instance() {
        static Network* const network = of_process();
        return *network;
    }

    void send(Message message) {
        pthread_mutex_lock(&mutex_);
        if (!is_running_) {
            pthread_t thread;
            is_running_ = pthread_create(&thread, nullptr, run, this) == 0;
        }
        message.epoch = epoch_;
        messages_.push_back(message);
        pthread_cond_signal(&wake_);
        pthread_mutex_unlock(&mutex_);
    }

    // What is sent to a PE later is delivered later.
    void fence() {
        pthread_mutex_lock(&mutex_);
        ++epoch_;
        pthread_mutex_unlock(&mutex_);
    }

    bool is_quiet() {
        pthread_mutex_lock(&mutex_);
        const bool is_quiet = messages_.empty() && !is_delivering_;
        pthread_mutex_unlock(&mutex_);
        return is_quiet;
    }

  private:
    // The first module to ask makes it. Never deleted: its thread runs until the process ends.
    static Network* of_process() {
        char name[64], address[32];
        snprintf(name, sizeof(name), "EPCOMM_EMULATED_NETWORK_%d", static_cast<int>(getpid()));
        if (const char* made = getenv(name)) return reinterpret_cast<Network*>(strtoull(made, nullptr, 16));
        Network* const network = new Network;
        snprintf(address, sizeof(address), "%llx", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(network)));
        setenv(name, address, 1);
        return network;
    }

    static void* run(void* network) {
        static_cast<Network*>(network)->deliver();
        return nullptr;
    }

    void deliver() {
        pthread_mutex_lock(&mutex_);
        for (;;) {
            while (messages_.empty()) pthread_cond_wait(&wake_, &mutex_);
            const uint32_t number = random();
            if (number % 4 == 0) {  // more may come meanwhile, and overtake
                pthread_mutex_unlock(&mutex_);
                usleep(number / 4 % 100);
                pthread_mutex_lock(&mutex_);
            }
            const size_t index = choose();
            const Message message = messages_[index];
            messages_.erase(messages_.begin() + index);
            is_delivering_ = true;
            pthread_mutex_unlock(&mutex_);
            if (message.num_bytes != 0) memcpy(message.to, message.from, message.num_bytes);
            if (message.word_bytes == 8) {
                __atomic_store_n(static_cast<uint64_t*>(message.word), message.value, __ATOMIC_RELEASE);
            } else {
                __atomic_store_n(static_cast<uint32_t*>(message.word), static_cast<uint32_t>(message.value), __ATOMIC_RELEASE);
            }
            pthread_mutex_lock(&mutex_);
            is_delivering_ = false;
        }
    }

    // One that no fence holds back.
    size_t choose() {
        const size_t any = random() % messages_.size();
        size_t first = any;
        for (size_t i = 0; i < messages_.size(); ++i) {
            if (messages_[i].pe == messages_[any].pe && messages_[i].epoch < messages_[first].epoch) first = i;
        }
        return first;
    }

    uint32_t random() {
        state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<uint32_t>(state_ >> 33);
    }

    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
    std::vector<Message> messages_;
    uint64_t epoch_ = 0;
    uint64_t state_ = static_cast<uint64_t>(getpid());
    bool is_running_ = false;
    bool is_delivering_ = false;
};

}  // namespace emulator
