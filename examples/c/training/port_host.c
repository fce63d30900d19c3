/* A PC: the C library. */
#include "port.h"

#include <stdio.h>
#include <stdlib.h>

static FILE *files[8];

uint64_t port_instructions[3];

int port_open(const char *path)
{
    int file = 0;
    while (file < 8 && files[file] != NULL)
        file++;
    if (file == 8)
        return -1;
    files[file] = fopen(path, "rb");
    return files[file] == NULL ? -1 : file;
}

int port_read(int file, uint32_t offset, uint8_t *buffer, uint32_t size)
{
    if (fseek(files[file], (long)offset, SEEK_SET) != 0)
        return -1;
    return fread(buffer, 1, size, files[file]) == size ? 0 : -1;
}

void port_print(const char *text)
{
    fputs(text, stdout);
    fflush(stdout);
}

void port_mark(uint32_t phase)
{
    (void)phase;
}

uint32_t port_stack(void)
{
    return 0;
}

void port_exit(int status)
{
    exit(status);
}
