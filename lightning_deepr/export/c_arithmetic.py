"""C text that no network changes: the draws, and the functions of the C library that the program does without.

``@p@`` is the prefix of all names. ``docs/on-device.md`` describes the program.
"""

from __future__ import annotations

import math

from lightning_deepr.algorithm import randomness


def hexadecimal(value: float) -> str:
    """Write a double literal of C99 that has exactly this value.

    Example::

        >>> hexadecimal(0.1)
        '0x1.999999999999ap-4'
    """
    return value.hex()


def bits_of_float() -> str:
    return """\
static uint32_t @p@_word(float value)
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

static float @p@_float(uint32_t word)
{
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}
"""


def draws() -> str:
    """The hash of ``algorithm/randomness.py``."""
    return f"""\
/* Draws: the finalizer of SplitMix64 of key + counter * golden. A key hashes (seed, purpose, step, attempt), a counter is the
 * tensor's number above the slot's. No state is kept, so a training continues from (seed, step). */
#define GOLDEN UINT64_C(0x{randomness.GOLDEN:016X})
#define LARGEST_DRAW UINT64_C(0x{randomness.LARGEST:016X})

static uint64_t @p@_mix(uint64_t word)
{{
    word = (word ^ (word >> 30)) * UINT64_C(0x{randomness.MULTIPLIER_1:016X});
    word = (word ^ (word >> 27)) * UINT64_C(0x{randomness.MULTIPLIER_2:016X});
    return word ^ (word >> 31);
}}

static uint64_t @p@_bits(uint64_t key, uint64_t counter)
{{
    return @p@_mix(counter * GOLDEN + key);
}}

static uint64_t @p@_absorb(uint64_t state, uint64_t coordinate)
{{
    return @p@_mix(state + GOLDEN + @p@_mix(coordinate));
}}
"""


def remainder() -> str:
    return """\
/* The remainder of a 63-bit draw by total, with reciprocal = (2^64 - 1) / total: chips without a 64-bit division take ten
 * times as long for one. The quotient below is the right one or one too small. */
static uint32_t @p@_remainder(uint64_t draw, uint64_t reciprocal, uint32_t total)
{
    const uint64_t high = draw >> 32, low = draw & UINT32_MAX, r_high = reciprocal >> 32, r_low = reciprocal & UINT32_MAX;
    const uint64_t first = high * r_low + (low * r_low >> 32);
    const uint64_t second = low * r_high + (first & UINT32_MAX);
    const uint64_t quotient = high * r_high + (first >> 32) + (second >> 32);
    const uint64_t rest = draw - quotient * total;
    return (uint32_t)(rest >= total ? rest - total : rest);
}
"""


def softmax() -> str:
    """exp and log in float, after Cephes (Moshier): two units in the last place."""
    return """\
/* Constants are variables: a compiler for x87 computes with unrounded ones. */
static float @p@_exp(float x) /* x <= 0 */
{
    static const float series[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    static const float per_turn = 1.44269504f, turn_high = 0.693359375f, turn_low = -2.12194440e-4f;
    float n, r, y = series[0], q;
    int32_t whole, i;
    if (!(x > -87.0f))
        return x == x ? 0.0f : x;
    q = x * per_turn;
    q = q - 0.5f;
    whole = (int32_t)q;
    n = (float)whole;
    q = n * turn_high;
    r = x - q;
    q = n * turn_low;
    r = r - q;
    for (i = 1; i < 6; i++) {
        y = y * r;
        y = y + series[i];
    }
    y = y * r;
    y = y * r;
    y = y + r;
    y = y + 1.0f;
    return y * @p@_float((uint32_t)(whole + 127) << 23);
}

static float @p@_log(float x) /* x >= 1 */
{
    static const float series[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                    -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                    2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
    static const float turn_high = 0.693359375f, turn_low = -2.12194440e-4f, root = 0.707106781f;
    const uint32_t word = @p@_word(x);
    int32_t exponent = (int32_t)(word >> 23) - 126, i;
    float m = @p@_float((word & 0x007FFFFFu) | 0x3F000000u), y = series[0], q, z;
    if (!(x < 3.0e38f))
        return x;
    if (m < root) {
        exponent -= 1;
        m = m + m;
    }
    m = m - 1.0f;
    z = m * m;
    for (i = 1; i < 9; i++) {
        y = y * m;
        y = y + series[i];
    }
    y = y * m;
    y = y * z;
    q = (float)exponent * turn_low;
    y = y + q;
    q = z * 0.5f;
    y = y - q;
    z = m + y;
    q = (float)exponent * turn_high;
    return z + q;
}
"""


def _series(numbers: list[float]) -> str:
    return ",\n        ".join(hexadecimal(number) for number in numbers)


def logarithm() -> str:
    """log and sin in double: series whose remaining terms are below 1e-17."""
    return f"""\
static double @p@_log_double(double x) /* x > 0, normal */
{{
    static const double series[11] = {{
        {_series([2.0 / (2 * i + 1) for i in range(11)])}}};
    uint64_t word;
    double m, s, q, sum = 0.0;
    int32_t exponent, i;
    memcpy(&word, &x, sizeof word);
    exponent = (int32_t)(word >> 52) - 1023;
    word = (word & UINT64_C(0xFFFFFFFFFFFFF)) | UINT64_C(0x3FF0000000000000);
    memcpy(&m, &word, sizeof m);
    if (m > 1.4142135623730951) {{
        m *= 0.5;
        exponent += 1;
    }}
    s = (m - 1.0) / (m + 1.0);
    q = s * s;
    for (i = 10; i >= 0; i--)
        sum = series[i] + q * sum;
    return (double)exponent * 0.6931471805599453 + s * sum;
}}
"""


def cosine() -> str:
    return f"""\
static double @p@_cos_of_turns(double turns) /* cos(2 pi turns) for turns from 0 to 1 */
{{
    static const double series[10] = {{
        {_series([math.cos(math.pi * i) / math.factorial(2 * i + 1) for i in range(1, 11)])}}};
    const double t = turns < 0.5 ? 0.5 - turns : turns - 0.5;
    const double z = (t - 0.25) * {hexadecimal(2 * math.pi)};
    const double q = z * z;
    double sum = 0.0;
    int32_t i;
    for (i = 9; i >= 0; i--)
        sum = series[i] + q * sum;
    return z + z * q * sum;
}}
"""


def exponential() -> str:
    return f"""\
static double @p@_exp_double(double x) /* |x| <= 700 */
{{
    const int32_t whole = (int32_t)(x * {hexadecimal(1 / math.log(2))} + (x < 0.0 ? -0.5 : 0.5));
    const double high = (double)whole * 6.93147180369123816490e-01, low = (double)whole * 1.90821492927058770002e-10;
    const double r = (x - high) - low;
    double sum = 1.0, power;
    uint64_t word = (uint64_t)(whole + 1023) << 52;
    int32_t i;
    for (i = 18; i > 0; i--)
        sum = 1.0 + sum * r / (double)i;
    memcpy(&power, &word, sizeof power);
    return sum * power;
}}
"""


def normal() -> str:
    """Standard normal deviates: Box-Muller, as ``randomness.normal``."""
    return """\
static double @p@_sqrt(double x) /* x >= 0 */
{
    uint64_t word;
    double root;
    int32_t i;
    if (!(x > 0.0))
        return 0.0;
    memcpy(&word, &x, sizeof word);
    word = (word >> 1) + UINT64_C(0x1FF8000000000000);
    memcpy(&root, &word, sizeof root);
    for (i = 0; i < 6; i++)
        root = 0.5 * (root + x / root);
    return root;
}

static double @p@_normal(uint64_t word)
{
    const double first = ((double)(uint32_t)(word >> 32) + 0.5) * 0x1p-32;
    const double turns = ((double)(uint32_t)word + 0.5) * 0x1p-32;
    return @p@_sqrt(@p@_log_double(first) * -2.0) * @p@_cos_of_turns(turns);
}
"""
