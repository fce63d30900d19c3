/* The network alone, for `size`: what it takes of a microcontroller's flash (text and data) and RAM (data and bss). */
#include "model.h"

void classify(const float *in, float *out);

void classify(const float *in, float *out)
{
    predict(in, out);
}
