/* An Arm Cortex-M without a C library's start: files and text by semihosting, which an emulator or a debugger answers.
 * Instructions are those of QEMU with -icount shift=0: each takes 1 ns, and a tick of the board's 25 MHz takes 40. */
#include "port.h"

#include <string.h>

#define SYS_OPEN 0x01
#define SYS_WRITE0 0x04
#define SYS_READ 0x06
#define SYS_SEEK 0x0A
#define SYS_EXIT 0x18
#define TICK 40u
#define UNUSED_STACK 0xDEADBEEFu

extern uint32_t data_start, data_end, data_in_flash, bss_start, bss_end, stack_top;
int main(void);

uint64_t port_instructions[3];

static int call(int what, const void *argument)
{
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

int port_open(const char *path)
{
    const uint32_t block[3] = {(uint32_t)(uintptr_t)path, 1u /* rb */, (uint32_t)strlen(path)};
    return call(SYS_OPEN, block);
}

int port_read(int file, uint32_t offset, uint8_t *buffer, uint32_t size)
{
    const uint32_t seek[2] = {(uint32_t)file, offset};
    const uint32_t block[3] = {(uint32_t)file, (uint32_t)(uintptr_t)buffer, size};
    return call(SYS_SEEK, seek) == 0 && call(SYS_READ, block) == 0 ? 0 : -1; /* the result is what is left to read */
}

void port_print(const char *text)
{
    call(SYS_WRITE0, text);
}

void port_exit(int status)
{
    call(SYS_EXIT, (const void *)(uintptr_t)(status == 0 ? 0x20026u : 0x20023u)); /* an end, or an error, of the program */
    for (;;)
        continue;
}

#define SYSTICK ((volatile uint32_t *)0xE000E010u) /* control, reload, value */

void port_mark(uint32_t phase)
{
    static uint32_t last;
    const uint32_t now = 0xFFFFFFu - SYSTICK[2];
    if (phase > 0)
        port_instructions[phase - 1] += (uint64_t)((now - last) & 0xFFFFFFu) * TICK;
    last = now;
}

uint32_t port_stack(void)
{
    const uint32_t *at = &bss_end;
    while (*at == UNUSED_STACK)
        at++;
    return (uint32_t)((uintptr_t)&stack_top - (uintptr_t)at);
}

void start(void);
void start(void)
{
    uint32_t *to, *const here = (uint32_t *)__builtin_frame_address(0) - 16;
    memcpy(&data_start, &data_in_flash, (size_t)((uintptr_t)&data_end - (uintptr_t)&data_start));
    memset(&bss_start, 0, (size_t)((uintptr_t)&bss_end - (uintptr_t)&bss_start));
    for (to = &bss_end; to < here; to++)
        *to = UNUSED_STACK;
#ifdef __ARM_FP
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* the FPU is off at first */
    __asm__ volatile("dsb\n\tisb");
#endif
    SYSTICK[1] = 0xFFFFFFu;
    SYSTICK[2] = 0;
    SYSTICK[0] = 5u; /* count the processor's clock, without interrupts */
    port_exit(main());
}

static void fault(void)
{
    port_print("fault\n");
    port_exit(1);
}

struct table {
    uint32_t *stack;
    void (*handlers[15])(void);
};
__attribute__((section(".vectors"), used)) static const struct table vectors = {
    &stack_top, {start, fault, fault, fault, fault, fault},
};
