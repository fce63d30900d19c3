/* Runs the network of model.h on the digits of digits.h and compares with PyTorch's outputs. make_example.py writes both
 * headers.
 *
 *     cc -O2 -std=c99 -Wall -Werror -o digits main.c && ./digits
 *
 * The exit status is 0 if every output is within the tolerance of digits.h. */
#include <stdio.h>

#include "digits.h"
#include "model.h"

static int largest(const float *values)
{
    int best = 0;
    for (int i = 1; i < PREDICT_OUTPUTS; i++)
        if (values[i] > values[best])
            best = i;
    return best;
}

int main(void)
{
    float in[PREDICT_INPUTS], out[PREDICT_OUTPUTS], difference = 0.0f;
    int correct = 0, same = 0;
    for (int n = 0; n < DIGITS; n++) {
        for (int i = 0; i < PREDICT_INPUTS; i++)
            in[i] = (float)digits[n][i] / 255.0f;
        predict(in, out);
        correct += largest(out) == labels[n];
        same += largest(out) == largest(expected[n]);
        for (int i = 0; i < PREDICT_OUTPUTS; i++) {
            float d = out[i] > expected[n][i] ? out[i] - expected[n][i] : expected[n][i] - out[i];
            if (!(d <= difference)) /* NaN, too */
                difference = d;
        }
    }
    printf("%d digits: %d correct, %d decided as by PyTorch, outputs differ by at most %.3g\n", DIGITS, correct, same,
           (double)difference);
    return difference <= TOLERANCE ? 0 : 1;
}
