/* Trains the network of deepr_net.c on MNIST, whose digits are read one batch at a time, and prints the test accuracy.
 *
 * The files are MNIST's own (IDX, not compressed), in the working folder or in DATA. All settings are macros:
 * -DEPOCHS=10 -DLR=0.05f -DSEED=1 -DSHIFTS=1 -DTRAIN=60000 -DTEST=10000. */
#include "deepr_net.h"
#include "port.h"

#include <string.h>

#ifndef EPOCHS
#define EPOCHS 1
#endif
#ifndef LR
#define LR 0.05f
#endif
#ifndef SEED
#define SEED 0
#endif
#ifndef SHIFTS /* shift a digit by up to one pixel with probability .8, except in the last fifth of the training */
#define SHIFTS 0
#endif
#ifndef TRAIN
#define TRAIN 60000
#endif
#ifndef TEST
#define TEST 10000
#endif
#ifndef DATA
#define DATA ""
#endif
#define SIDE 28
#define PIXELS (SIDE * SIDE)

static deepr_net net;
static deepr_input digits[DEEPR_BATCH * DEEPR_INPUTS];
static uint16_t labels[DEEPR_BATCH];

static void print_number(uint32_t number)
{
    char text[11];
    int at = 10;
    text[at] = '\0';
    do {
        text[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    port_print(text + at);
}

static void print_line(const char *what, uint32_t number, const char *unit)
{
    port_print(what);
    print_number(number);
    port_print(unit);
}

static void print_fraction(const char *what, float value) /* three decimals */
{
    const uint32_t thousandths = (uint32_t)(value * 1000.0f + 0.5f);
    port_print(what);
    print_number(thousandths / 1000);
    port_print(thousandths % 1000 < 10 ? ".00" : thousandths % 1000 < 100 ? ".0" : ".");
    print_number(thousandths % 1000);
}

static uint32_t hash(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* The digit at a position of an epoch: a permutation of 0 ... size - 1 that needs no table (four rounds of a Feistel network on
 * 16 bits; numbers from size on are passed through it again). */
static uint32_t shuffled(uint32_t position, uint32_t size, uint32_t epoch)
{
    uint32_t left = position >> 8, right = position & 255u, round, next;
    do {
        for (round = 0; round < 4; round++) {
            next = left ^ (hash(right + 256u * (round + 4u * (epoch + 4096u * (uint32_t)SEED))) & 255u);
            left = right;
            right = next;
        }
    } while ((left << 8 | right) >= size);
    return left << 8 | right;
}

static int read_digit(int images, int classes, uint32_t number, deepr_input *x, uint16_t *label)
{
    uint8_t byte;
    if (port_read(images, 16u + PIXELS * number, x, PIXELS) != 0 || port_read(classes, 8u + number, &byte, 1) != 0)
        return -1;
    *label = byte;
    return 0;
}

static void shift(deepr_input *x, uint32_t draw)
{
    const int down = (int)(draw % 3) - 1, right = (int)(draw / 3 % 3) - 1, by = SIDE * down + right;
    int row;
    if (by > 0) {
        memmove(x + by, x, (size_t)(PIXELS - by));
        memset(x, 0, (size_t)by);
    } else if (by < 0) {
        memmove(x, x - by, (size_t)(PIXELS + by));
        memset(x + PIXELS + by, 0, (size_t)-by);
    }
    for (row = 0; row < SIDE && right != 0; row++) /* what has come from the other edge */
        x[SIDE * row + (right > 0 ? 0 : SIDE - 1)] = 0;
}

static uint32_t count_correct(int images, int classes)
{
    uint32_t n, correct = 0;
    for (n = 0; n < TEST; n++) {
        if (read_digit(images, classes, n, digits, labels) != 0)
            return 0;
        correct += deepr_predict(&net, digits) == (int)labels[0];
    }
    return correct;
}

int main(void)
{
    const int images = port_open(DATA "train-images-idx3-ubyte"), classes = port_open(DATA "train-labels-idx1-ubyte");
    const int test_images = port_open(DATA "t10k-images-idx3-ubyte"), test_classes = port_open(DATA "t10k-labels-idx1-ubyte");
    const uint32_t steps = TRAIN / DEEPR_BATCH, total = steps * EPOCHS;
    uint32_t epoch, step, b, correct;
    if (images < 0 || classes < 0 || test_images < 0 || test_classes < 0) {
        port_print("expected the four files of MNIST, not compressed\n");
        port_exit(1);
    }
    deepr_init(&net, SEED);
    print_line("", DEEPR_CONNECTIONS, " connections, ");
    print_line("static bytes: ", (uint32_t)(sizeof net + sizeof digits + sizeof labels), "\n");
    for (epoch = 0; epoch < EPOCHS; epoch++) {
        float loss = 0.0f;
        for (step = 0; step < steps; step++) {
            const float progress = (float)(epoch * steps + step) / (float)total;
            const float rest = 1.0f - progress * progress * (3.0f - 2.0f * progress); /* close to a cosine */
            float one;
            for (b = 0; b < DEEPR_BATCH; b++) {
                const uint32_t number = shuffled(step * DEEPR_BATCH + b, TRAIN, epoch);
                const uint32_t draw = hash(hash(number + 65536u * epoch) + (uint32_t)SEED);
                deepr_input *const x = digits + b * DEEPR_INPUTS;
                if (read_digit(images, classes, number, x, labels + b) != 0)
                    port_exit(1);
                if (SHIFTS && progress < 0.8f && draw % 5u > 0)
                    shift(x, draw / 5u);
            }
            one = deepr_train_step(&net, digits, labels, LR * rest, progress);
            if (!(one >= 0.0f)) {
                port_print("the step was refused, or the loss is not finite\n");
                port_exit(1);
            }
            loss += one;
        }
        correct = count_correct(test_images, test_classes);
        print_line("epoch ", epoch + 1, ": ");
        print_fraction("loss ", loss / (float)steps);
        print_fraction(", test accuracy ", 100.0f * (float)correct / (float)TEST);
        port_print(" %\n");
    }
    if (port_instructions[0] > 0) {
        print_line("instructions per step: forward ", (uint32_t)(port_instructions[0] / total), "");
        print_line(", backward ", (uint32_t)(port_instructions[1] / total), "");
        print_line(", rewiring ", (uint32_t)(port_instructions[2] / total), "\n");
    }
    if (port_stack() > 0)
        print_line("most stack: ", port_stack(), " bytes\n");
    port_exit(0);
    return 0;
}
