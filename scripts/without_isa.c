// Preloaded by without_isa: each CPUID traps and is answered without the bits in HIDDEN, a list of initializers.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static const struct { unsigned leaf, subleaf, answer, bits; } hidden[] = {HIDDEN};
static const int answers[] = {REG_RAX, REG_RBX, REG_RCX, REG_RDX};

// glibc's own sigaction, below ours.
extern int __sigaction(int number, const struct sigaction *action, struct sigaction *before);

static long allow_cpuid(int allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void trapped(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    // SI_KERNEL is no bad address, so the code can be read.
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        struct sigaction ending = {.sa_handler = SIG_DFL};
        __sigaction(number, &ending, NULL);
        raise(number);
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], found[4];
    allow_cpuid(1);
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    allow_cpuid(0);
    for (unsigned i = 0; i < sizeof hidden / sizeof *hidden; i++)
        if (hidden[i].leaf == leaf && hidden[i].subleaf == subleaf)
            found[hidden[i].answer] &= ~hidden[i].bits;
    for (int i = 0; i < 4; i++) registers[answers[i]] = found[i];
    registers[REG_RIP] += 2;
}

// A program that takes SIGSEGV for itself (faulthandler, pytest, TVM) would die at its next CPUID.
int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
    return __sigaction(number, number == SIGSEGV ? NULL : action, before);
}

sighandler_t signal(int number, sighandler_t handler) { return number == SIGSEGV ? SIG_DFL : ssignal(number, handler); }

__attribute__((constructor)) static void start(void) {
    // On the alternate stack of threads that have one: their own may be small.
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigfillset(&action.sa_mask);
    if (__sigaction(SIGSEGV, &action, NULL) || allow_cpuid(0)) {
        perror("CPUID does not trap");
        _exit(5);
    }
}
