/* What train.c needs from the machine that it runs on: port_host.c has it for a PC, port_semihosting.c for an Arm board under
 * an emulator or a debugger. */
#ifndef PORT_H
#define PORT_H

#include <stdint.h>

int port_open(const char *path);                                              /* a file to read; -1: there is none */
int port_read(int file, uint32_t offset, uint8_t *buffer, uint32_t size);     /* 0, or -1 */
void port_print(const char *text);
void port_exit(int status);

/* Instructions since the last mark are added to those of the phase before it; compile deepr_net.c with
 * -include port.h '-DDEEPR_MARK=port_mark'. */
void port_mark(uint32_t phase);
extern uint64_t port_instructions[3];                                         /* forward, backward, rewiring; 0: not counted */
uint32_t port_stack(void);                                                    /* most bytes of stack so far; 0: not known */

#endif
