// faults.h: a bad address, or a stack that is full, ends the launch with a message, and not the process.
#pragma once

#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>

#include "emulator/scheduler.h"

namespace emulator {

// Once a process, like the pools.
struct FaultHandlers {
    bool are_installed;
    struct sigaction before_segv, before_bus;
};
[[gnu::visibility("default")]] inline FaultHandlers fault_handlers;

#if defined(__x86_64__)

// Where a fiber goes on after its fault.
inline void report_fault() {
    Launch& launch = *current().launch;
    fail("%s %p, at %p", launch.has_overflow ? "the stack is full:" : "illegal address", launch.fault_address,
         launch.fault_place);
}

inline void handle_fault(int number, siginfo_t* info, void* data) {
    greg_t* registers = static_cast<ucontext_t*>(data)->uc_mcontext.gregs;
    const uint64_t sp = registers[REG_RSP];
    if (!stack_pool.holds(sp)) {
        const struct sigaction& before = number == SIGSEGV ? fault_handlers.before_segv : fault_handlers.before_bus;
        if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, data);
        if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
        signal(number, SIG_DFL);  // the instruction is tried again, and ends the process
        return;
    }
    Thread* thread = thread_at(sp);
    Launch& launch = *thread->launch;
    launch.fault_address = info->si_addr;
    launch.fault_place = reinterpret_cast<void*>(registers[REG_RIP]);
    launch.has_overflow = reinterpret_cast<uint64_t>(info->si_addr) / kStackBytes == sp / kStackBytes;
    // The fiber does not come back to where it was, so its whole stack is free.
    registers[REG_RSP] = reinterpret_cast<uint64_t>(thread) / 16 * 16 - 8;
    registers[REG_RIP] = reinterpret_cast<uint64_t>(report_fault);
}

// The handler needs a stack of its own: that of a fiber may be full.
class CatchFaults {
  public:
    CatchFaults() {
        if (!__atomic_exchange_n(&fault_handlers.are_installed, true, __ATOMIC_ACQ_REL)) {
            struct sigaction action = {};
            action.sa_sigaction = handle_fault;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigaction(SIGSEGV, &action, &fault_handlers.before_segv);
            sigaction(SIGBUS, &action, &fault_handlers.before_bus);
        }
        sigaltstack(nullptr, &before_);
        if (!(before_.ss_flags & SS_DISABLE)) return;
        const stack_t own = {.ss_sp = memory_ = malloc(kBytes), .ss_flags = 0, .ss_size = kBytes};
        sigaltstack(&own, nullptr);
    }
    ~CatchFaults() {
        if (memory_ == nullptr) return;
        sigaltstack(&before_, nullptr);
        free(memory_);
    }

  private:
    static constexpr size_t kBytes = 64 << 10;
    stack_t before_ = {};
    void* memory_ = nullptr;
};

#else

class CatchFaults {};

#endif

}  // namespace emulator
