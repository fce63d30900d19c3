/* The time of the exported program on the first digits of MNIST, which are read before. Compile with -DDATA='"folder of MNIST/"'. */
#include "deepr_net.h"

#include <stdio.h>
#include <time.h>

static deepr_net net;
static uint8_t images[60000u * DEEPR_INPUTS], classes[60000];

static int read_all(const char *name, long offset, uint8_t *to, size_t size)
{
    FILE *file = fopen(name, "rb");
    const int fine = file != NULL && fseek(file, offset, SEEK_SET) == 0 && fread(to, 1, size, file) == size;
    if (file != NULL)
        fclose(file);
    return fine;
}

int main(void)
{
    uint16_t labels[DEEPR_BATCH];
    double loss = 0.0;
    clock_t begin;
    uint32_t step, b;
    if (!read_all(DATA "train-images-idx3-ubyte", 16, images, sizeof images) ||
        !read_all(DATA "train-labels-idx1-ubyte", 8, classes, sizeof classes))
        return 1;
    deepr_init(&net, 0);
    begin = clock();
    for (step = 0; step < STEPS; step++) {
        for (b = 0; b < DEEPR_BATCH; b++)
            labels[b] = classes[step * DEEPR_BATCH + b];
        loss += (double)deepr_train_step(&net, images + step * DEEPR_BATCH * DEEPR_INPUTS, labels, 0.4f, (float)step / (float)STEPS);
    }
    printf("%.3f us per step, loss %.3f\n", 1e6 * (double)(clock() - begin) / CLOCKS_PER_SEC / STEPS, loss / STEPS);
    return 0;
}
