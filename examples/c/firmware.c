/* The network alone, so that `size` shows the flash (text and data) and the RAM (data and bss) that it needs. */
#include "model.h"

void classify(const float *in, float *out);

void classify(const float *in, float *out)
{
    predict(in, out);
}
