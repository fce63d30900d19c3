"""C text of one layer of the program that trains: forward, backward with the step, and rewiring.

``@p@`` is the prefix of all names, ``@i@`` the number of the layer. The order of every sum is that of the slots (a layer's
outputs) and of the samples (a gradient), and every operation rounds: another program that keeps to it gets equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_deepr.algorithm import randomness
from lightning_deepr.export.c_arithmetic import hexadecimal
from lightning_deepr.export.c_plan import Plan


def fill(text: str, **values: object) -> str:
    """Replace ``@name@`` by its value."""
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def constants(plan: Plan, i: int) -> str:
    """The macros of a layer."""
    layer = plan.layers[i]
    text = f"#define ROWS_@i@ {layer.rows}u\n#define COLUMNS_@i@ {layer.columns}u\n"
    if layer.is_sparse:
        rest = (randomness.LARGEST % layer.total + 1) % layer.total
        text += f"""\
#define K_@i@ {layer.count}u
#define N_@i@ {layer.total}u
#define COLUMN_BITS_@i@ {plan.column_bits[i]}u
#define RECIPROCAL_@i@ UINT64_C({((1 << 64) - 1) // layer.total})
#define LAST_DRAW_@i@ UINT64_C({randomness.LARGEST - rest}) /* a draw above would favour low places */
#define COUNTER_@i@ UINT64_C({layer.index << randomness.SLOT_BITS})
#define STEP_@i@ (net->step + UINT64_C({0 if plan.options.untrained else layer.first_step}))
"""
    return text


# -- theta: float, or 15 bits of a fixed-point number -------------------------------------------------------------------------


def storage(plan: Plan) -> str:
    """How a slot is stored: theta with the sign of its place in the top bit; all bits set: it has gone dormant."""
    if not plan.options.narrow:
        return """\
/* A slot is a float, sign * theta (-0 at theta 0). All bits are set while its connection is dormant. */
#define DORMANT UINT32_MAX
#define SIGN 0x80000000u
#define WEIGHT(slot) (slot)
#define BITS(slot) @p@_word(slot)

static float @p@_slot(uint32_t word)
{
    return @p@_float(word);
}
"""
    return """\
/* A slot has 16 bits: the sign of its place, and theta as a multiple of QUANTUM. All bits are set while its connection is
 * dormant. */
#define DORMANT UINT16_MAX
#define SIGN 0x8000u
#define QUANTUM @quantum@f
#define QUANTA @quanta@f
#define WEIGHT(slot) @p@_weight(slot)
#define BITS(slot) (slot)

static float @p@_weight(uint16_t slot)
{
    const float theta = (float)(slot & 0x7FFFu) * QUANTUM;
    return (slot & SIGN) != 0 ? -theta : theta;
}

static uint16_t @p@_slot(uint32_t word)
{
    return (uint16_t)word;
}

/* Rounds up with the probability of the fraction, so that the mean is theta. */
static uint32_t @p@_rounded(float theta, uint32_t draw)
{
    const float drawn = (float)draw * 0x1p-16f, whole = theta * QUANTA;
    const float sum = whole + drawn;
    return sum < 32766.0f ? (uint32_t)sum : 32766u;
}
"""


# -- a sum over the samples of a batch, or over the one of a batch of 1 -------------------------------------------------------


# array: the pointer to a unit's samples, and which unit
_UNITS = {"out": ("sums", "row"), "delta": ("deltas", "row"), "in": ("values", "column"), "before": ("backs", "column")}


@dataclass(frozen=True)
class Samples:
    """How a function goes through the samples: ``count`` is 1, or the batch."""

    plan: Plan
    count: int

    @property
    def size(self) -> str:
        return "" if self.count == 1 else " * @P@_BATCH"

    def at(self, array: str) -> str:
        """The value of ``row`` or ``column``; all samples of a unit lie together. A batch needs :meth:`pointers` before."""
        name, unit = _UNITS[array]
        return f"{array}[{unit}]" if self.count == 1 else f"{name}[b]"

    def pointers(self, *arrays: str) -> str:
        """Point to a unit: sums of 32-bit numbers for each sample would cost more than the product."""
        text = ""
        for array in arrays if self.count > 1 else ():
            name, unit = _UNITS[array]
            text += f"{'' if array in ('out', 'before') else 'const '}float *const {name} = {array} + {unit} * @P@_BATCH;\n"
        return text

    def pointer_to_input(self, i: int) -> str:
        if i > 0 or self.count == 1:
            return self.pointers("in")
        return "const @p@_input *const values = in + column;\n"

    def input(self, i: int) -> str:
        """The value of input ``column`` of layer i. The network's inputs lie sample by sample."""
        if i > 0:
            return self.at("in")
        place = "in[column]" if self.count == 1 else "values[b * COLUMNS_0]"
        return place if self.plan.options.floats else f"@p@_byte[{place}]"

    def each(self, text: str) -> str:
        """Do something for each sample."""
        return text if self.count == 1 else "for (b = 0; b < @P@_BATCH; b++) {\n" + indent(text, 4) + "}\n"

    def worth(self, text: str) -> str:
        """Do something if input ``column`` is not 0, where that can be told before."""
        return f"if (WORTH(in[column])) {{\n{indent(text, 4)}}}\n" if self.count == 1 else text

    def variables(self, *names: str) -> str:
        return f"    uint32_t {', '.join([*names, *(['b'] if self.count > 1 else [])])};\n"


def indent(text: str, spaces: int) -> str:
    return "".join(f"{' ' * spaces}{line}\n" for line in text.splitlines())


# A product with 0 adds nothing, and most pixels and many outputs of a ReLU are 0. A microcontroller has no pipeline to fill
# again after a branch, and one without an FPU takes a hundred instructions for a product.
SKIP = """\
/* Whether to test a factor for 0 before a product: that changes no result. */
#ifndef SKIP_ZEROS
#if defined(__x86_64__) || defined(__i386__) || defined(__aarch64__)
#define SKIP_ZEROS 0
#else
#define SKIP_ZEROS 1
#endif
#endif
#define WORTH(factor) (!SKIP_ZEROS || (factor) != 0)
"""

PLACE = """\
const uint32_t place = net->place@i@[k];
row = place >> COLUMN_BITS_@i@;
column = place & ((1u << COLUMN_BITS_@i@) - 1u);
"""


# -- forward ------------------------------------------------------------------------------------------------------------------


def forward(plan: Plan, i: int, samples: int) -> str:
    """The outputs of a layer: the bias, then the connections in the order of the slots, then ReLU."""
    layer, b = plan.layers[i], Samples(plan, samples)
    kind = "@p@_input" if i == 0 else "float"
    suffix = "" if samples == plan.options.batch else "_one"
    text = f"static void @p@_forward@i@{suffix}(const @p@_net *net, const {kind} *restrict in, float *restrict out)\n{{\n"
    text += b.variables("row", "column", *(["k"] if layer.is_sparse else []))
    begin = b.pointers("out") + b.each(f"{b.at('out')} = {'net->bias@i@[row]' if layer.bias is not None else '0.0f'};\n")
    text += "    for (row = 0; row < ROWS_@i@; row++) {\n" + indent(begin, 8) + "    }\n"
    stored = "WEIGHT(net->theta@i@[k])" if layer.is_sparse else "net->theta@i@[row * COLUMNS_@i@ + column]"
    weight = f"const float weight = {stored};\n"
    add = b.each(f"const float product = weight * {b.input(i)};\n{b.at('out')} += product;\n")
    add = b.worth(weight + b.pointers("out") + b.pointer_to_input(i) + add)
    if layer.is_sparse:
        text += "    for (k = 0; k < K_@i@; k++) {\n" + indent(PLACE + add, 8) + "    }\n"
    else:
        text += "    for (row = 0; row < ROWS_@i@; row++)\n        for (column = 0; column < COLUMNS_@i@; column++) {\n"
        text += indent(add, 12) + "        }\n"
    if layer.relu:
        text += f"    for (row = 0; row < ROWS_@i@{b.size}; row++)\n        out[row] = out[row] > 0.0f ? out[row] : 0.0f;\n"
    return text + "}\n"


# -- backward and the step of Algorithm 1 -------------------------------------------------------------------------------------


def backward(plan: Plan, i: int) -> str:
    """The gradient of the layer's inputs, if they are a layer's outputs, and the step of its weights and biases."""
    layer, options = plan.layers[i], plan.options
    b = Samples(plan, options.batch)
    masked = i > 0 and plan.layers[i - 1].relu
    arguments = [f"const {'@p@_input' if i == 0 else 'float'} *restrict in", "const float *restrict delta"]
    arguments += ["float *restrict before"] if i > 0 else []
    arguments += ["float lr"] + (["float decrement"] if layer.is_sparse else [])
    arguments += ["double noise"] if layer.is_sparse and options.temperature else []
    text = f"static void @p@_backward@i@(@p@_net *net, {', '.join(arguments)})\n{{\n"
    text += b.variables("row", "column", *(["k", "dead = 0"] if layer.is_sparse else []))
    if layer.is_sparse and options.temperature:
        text += f"    const uint64_t noise_key = @p@_step_key(net->seed, {randomness.NOISE}, STEP_@i@);\n"
    if layer.is_sparse and options.narrow:
        text += f"    const uint64_t round_key = @p@_step_key(net->seed, {randomness.ROUND}, STEP_@i@);\n"
        text += "    uint64_t drawn = 0;\n"
    if i > 0:
        text += f"    memset(before, 0, COLUMNS_@i@{b.size} * sizeof *before);\n"
    gradient = b.pointers("delta") + b.pointer_to_input(i) + (b.pointers("before") if i > 0 else "")
    gradient += "float gradient = 0.0f, move;\n"
    gradient += b.each(f"const float product = {b.at('delta')} * {b.input(i)};\ngradient += product;\n")
    if b.count == 1:
        gradient = f"float move = {b.at('delta')} * {b.input(i)};\nmove = lr * move;\n"
    else:
        gradient += "move = lr * gradient;\n"
    spread = ""
    if i > 0:
        product = "const float product = " if b.count > 1 else "const float back = "
        spread = b.each(f"{product}weight * {b.at('delta')};\n{b.at('before')} += {product.split()[2]};\n")
    if layer.is_sparse:
        step = gradient + "move = @p@_float(@p@_word(move) ^ sign);\ntheta = theta - move;\n"
        step = _joined(b, spread, step, masked)
        body = PLACE + _before_step() + (step if b.count == 1 else f"{{\n{indent(step, 4)}}}\n")
        text += (
            "    for (k = 0; k < K_@i@; k++) {\n" + indent(body + _after_step(plan), 8) + "    }\n    net->dead@i@ = dead;\n"
        )
    else:
        weight = "net->theta@i@[row * COLUMNS_@i@ + column]"
        step = gradient + f"{weight} -= move;\n"
        step = _joined(b, spread, step, masked)
        text += "    for (row = 0; row < ROWS_@i@; row++)\n        for (column = 0; column < COLUMNS_@i@; column++) {\n"
        text += indent((f"const float weight = {weight};\n" if i > 0 else "") + step, 12) + "        }\n"
    if layer.bias is not None:
        total = b.at("delta")
        sum_up = f"float move = lr * {total};\n"
        if b.count > 1:
            sum_up = b.pointers("delta") + f"float sum = 0.0f, move;\n{b.each(f'sum += {total};')}"
        sum_up += "" if b.count == 1 else "move = lr * sum;\n"
        text += "    for (row = 0; row < ROWS_@i@; row++) {\n" + indent(sum_up + "net->bias@i@[row] -= move;\n", 8) + "    }\n"
    if masked:
        text += f"    for (column = 0; column < COLUMNS_@i@{b.size}; column++)\n"
        text += "        before[column] = in[column] > 0.0f ? before[column] : 0.0f;\n"
    return text + "}\n"


def _joined(b: Samples, spread: str, step: str, masked: bool) -> str:
    """Join what a connection gives to its input's gradient and its own step. Behind a ReLU both are 0 if the input is."""
    if b.count > 1:
        return step + spread
    return b.worth(spread + step) if masked else spread + b.worth(step)


def _before_step() -> str:
    return """\
const float weight = WEIGHT(net->theta@i@[k]);
const uint32_t sign = @p@_word(weight) & 0x80000000u;
float theta = @p@_float(@p@_word(weight) ^ sign);
"""


def _after_step(plan: Plan) -> str:
    """L1 and noise; theta is stored, or the connection goes dormant."""
    text = "theta = theta - decrement;\n"
    if plan.options.temperature:
        text += "theta = theta + (float)(@p@_normal(@p@_bits(noise_key, COUNTER_@i@ + k)) * noise);\n"
    stored = "@p@_word(theta) | sign"
    if plan.options.narrow:
        text += "drawn = (k & 3u) == 0 ? @p@_bits(round_key, COUNTER_@i@ + (k >> 2)) : drawn >> 16;\n"
        stored = "@p@_rounded(theta, (uint32_t)(drawn & 0xFFFFu)) | sign >> 16"
    return (
        text
        + f"""\
if (theta < 0.0f)
    dead++;
net->theta@i@[k] = @p@_slot(theta < 0.0f ? DORMANT : {stored});
"""
    )


# -- rewiring -----------------------------------------------------------------------------------------------------------------


def sign_of(plan: Plan, i: int) -> str:
    """The sign of a place: the top bit of its hash, or its opposite for an exception."""
    layer = plan.layers[i]
    if plan.options.untrained:
        seed = f"@p@_absorb(@p@_absorb(@p@_absorb(3, net->seed), {randomness.SIGN}), UINT64_C({layer.index})) & LARGEST_DRAW"
    else:
        seed = f"UINT64_C({layer.sign_seed})"
    text = f"""\
static uint64_t @p@_sign_key@i@(const @p@_net *net)
{{
    {"" if plan.options.untrained else "(void)net;"}
    return {seed};
}}

static uint32_t @p@_sign@i@(uint64_t key, uint32_t packed)
{{
    const uint32_t place = (packed >> COLUMN_BITS_@i@) * COLUMNS_@i@ + (packed & ((1u << COLUMN_BITS_@i@) - 1u));
    {"uint32_t" if _excepted(plan, i) else "const uint32_t"} negative = (uint32_t)(@p@_bits(key, place) >> 63);
"""
    if _excepted(plan, i):
        text += f"""\
    uint32_t low = 0, high = {len(layer.exceptions)}u;
    while (low < high) {{
        const uint32_t middle = (low + high) / 2u;
        if (@p@_exceptions@i@[middle] < place)
            low = middle + 1u;
        else
            high = middle;
    }}
    if (low < {len(layer.exceptions)}u && @p@_exceptions@i@[low] == place)
        negative ^= 1u;
"""
    text += "    return negative != 0 ? SIGN : 0u;\n}\n"
    return "\n".join(line for line in text.split("\n") if line.strip() or not line)


def _excepted(plan: Plan, i: int) -> bool:
    return bool(len(plan.layers[i].exceptions)) and not plan.options.untrained


def rewire(plan: Plan, i: int) -> str:
    """New places for the dormant slots of a layer, uniform over all dormant places and without replacement."""
    layer = plan.layers[i]
    return _by_rejection(plan, i) if 2 * layer.count <= layer.total else _from_list(plan, i)


def stream_keys(plan: Plan) -> str:
    """The keys of births: of a step, or of the start."""
    text = """\
static uint64_t @p@_step_key(uint32_t seed, uint64_t purpose, uint64_t step)
{
    return @p@_absorb(@p@_absorb(@p@_absorb(3, seed), purpose), step);
}

"""
    if not (plan.options.temperature or plan.options.narrow):
        text = ""
    births = {2 * plan.layers[i].count <= plan.layers[i].total for i in plan.sparse}
    start = plan.options.untrained
    key = f"@p@_absorb(@p@_absorb(@p@_absorb(4, net->seed), {randomness.BIRTH}), step)"
    if True in births:
        text += f"""\
static uint64_t @p@_birth_key(const @p@_net *net, int start, uint64_t step, uint32_t attempt)
{{
    {
            f"if (start) return @p@_absorb(@p@_absorb(@p@_absorb(3, net->seed), {randomness.START_PLACES}), attempt);"
            if start
            else "(void)start;"
        }
    return @p@_absorb({key}, attempt);
}}
"""
    if False in births:
        text += f"""\
static uint64_t @p@_list_key(const @p@_net *net, int start, uint64_t step)
{{
    {f"if (start) return @p@_absorb(@p@_absorb(2, net->seed), {randomness.START_PLACES});" if start else "(void)start;"}
    return @p@_absorb({key}, 0);
}}
"""
    return text


def _by_rejection(plan: Plan, i: int) -> str:
    slot = "uint16_t" if plan.slot_bytes == 2 else "uint32_t"
    return f"""\
/* Every dormant slot draws a place. A draw is taken in the order (attempt, slot), unless a connection or an earlier draw has
 * its place; the other slots draw again. The draws wait in a hash table, and one pass over the connections finds those that
 * are taken already. At most half of the places are taken, so this ends. */
static void @p@_rewire@i@(@p@_net *net, int start)
{{
    const uint64_t signs = @p@_sign_key@i@(net);
    {slot} *const table = net->work.table;
    uint32_t left = net->dead@i@, attempt = 0, slot, k, at;
    while (left > 0) {{
        const uint64_t key = @p@_birth_key(net, start, STEP_@i@, attempt++);
        uint32_t open = left, size = 32u, shift = 27u;
        for (; size < TABLE && size < 16u * left; size *= 2u) /* few of the connections then meet a draw */
            shift--;
        for (slot = 0; open > 0;) {{
            uint32_t drawn = 0;
            memset(table, 0xFF, size * sizeof *table);
            for (; open > 0 && drawn < size / 2u; slot++) {{
                uint64_t draw;
                uint32_t place;
                if (BITS(net->theta@i@[slot]) != DORMANT)
                    continue;
                open--;
                draw = @p@_bits(key, COUNTER_@i@ + slot) & LARGEST_DRAW;
                if (draw > LAST_DRAW_@i@)
                    continue;
                place = @p@_remainder(draw, RECIPROCAL_@i@, N_@i@);
                place = (place / COLUMNS_@i@) << COLUMN_BITS_@i@ | place % COLUMNS_@i@;
                for (at = HASH(place, shift); table[at] != FREE; at = (at + 1u) & (size - 1u))
                    if (net->place@i@[table[at]] == place)
                        break;
                if (table[at] != FREE)
                    continue;
                table[at] = ({slot})slot;
                net->place@i@[slot] = ({_place_type(plan, i)})place;
                net->theta@i@[slot] = @p@_slot(@p@_sign@i@(signs, place));
                drawn++;
            }}
            left -= drawn;
            for (k = 0; drawn > 0 && k < K_@i@; k++) {{
                const uint32_t place = net->place@i@[k];
                at = HASH(place, shift);
                if (table[at] == FREE || BITS(net->theta@i@[k]) == DORMANT)
                    continue;
                for (; table[at] != FREE && table[at] != k; at = (at + 1u) & (size - 1u))
                    if (net->place@i@[table[at]] == place) {{
                        net->theta@i@[table[at]] = @p@_slot(DORMANT);
                        left++;
                        break;
                    }}
            }}
        }}
    }}
}}
"""


def _from_list(plan: Plan, i: int) -> str:
    return f"""\
/* More than half of the places are taken. The dormant places are put in the order of their hashes, and the dormant slots take
 * the first ones. As many as the working memory holds are found in one pass over all places. */
static void @p@_rewire@i@(@p@_net *net, int start)
{{
    const uint64_t signs = @p@_sign_key@i@(net), key = @p@_list_key(net, start, STEP_@i@);
    struct @p@_listed *const best = net->work.list.best;
    uint32_t *const taken = net->work.list.taken;
    uint32_t slot = 0, k;
    while (net->dead@i@ > 0) {{
        uint32_t from, found = 0, used = 0;
        for (from = 0; from < N_@i@; from += WINDOW) {{
            const uint32_t size = N_@i@ - from < WINDOW ? N_@i@ - from : WINDOW;
            memset(taken, 0, sizeof net->work.list.taken);
            for (k = 0; k < K_@i@; k++) {{
                const uint32_t packed = net->place@i@[k];
                const uint32_t place = (packed >> COLUMN_BITS_@i@) * COLUMNS_@i@ + (packed & ((1u << COLUMN_BITS_@i@) - 1u));
                if (place - from < size && BITS(net->theta@i@[k]) != DORMANT)
                    taken[(place - from) / 32u] |= 1u << (place - from) % 32u;
            }}
            for (k = 0; k < size; k++) {{
                uint64_t hash;
                uint32_t at;
                if ((taken[k / 32u] >> k % 32u & 1u) != 0)
                    continue;
                hash = @p@_bits(key, COUNTER_@i@ + from + k) ^ UINT64_C(0x8000000000000000); /* hashes are compared as signed */
                for (at = found; at > 0 && hash < ((uint64_t)best[at - 1].high << 32 | best[at - 1].low); at--)
                    if (at < BEST)
                        best[at] = best[at - 1];
                if (at == BEST)
                    continue;
                best[at].high = (uint32_t)(hash >> 32);
                best[at].low = (uint32_t)hash;
                best[at].place = from + k;
                found += found < BEST;
            }}
        }}
        for (; used < found && net->dead@i@ > 0; slot++)
            if (BITS(net->theta@i@[slot]) == DORMANT) {{
                const uint32_t place = best[used].place;
                const uint32_t packed = (place / COLUMNS_@i@) << COLUMN_BITS_@i@ | place % COLUMNS_@i@;
                net->place@i@[slot] = ({_place_type(plan, i)})packed;
                net->theta@i@[slot] = @p@_slot(@p@_sign@i@(signs, packed));
                net->dead@i@--;
                used++;
            }}
    }}
}}
"""


def _place_type(plan: Plan, i: int) -> str:
    return "uint16_t" if plan.place_bytes[i] == 2 else "uint32_t"


# -- the start ----------------------------------------------------------------------------------------------------------------


def start_untrained(plan: Plan, i: int) -> str:
    """Random places, and uniform magnitudes below 1 / sqrt(columns), times sqrt(N / K): a torch layer's start, made sparse."""
    layer = plan.layers[i]
    bound = hexadecimal(layer.columns**-0.5)
    text = f"    key = @p@_absorb(@p@_absorb(2, net->seed), {randomness.START_THETA});\n"
    if not layer.is_sparse:
        counter = f"UINT64_C({(len(plan.layers) + i) << randomness.SLOT_BITS}) + k"
        return (
            text
            + f"""\
    for (k = 0; k < ROWS_@i@ * COLUMNS_@i@; k++) {{
        double value = (double)(@p@_bits(key, {counter}) >> 11) * 0x1p-52 - 1.0;
        value = value * {bound};
        net->theta@i@[k] = (float)value;
    }}
"""
        )
    stored = "@p@_rounded((float)value, 0x8000u)" if plan.options.narrow else "@p@_word((float)value)"
    return f"""\
    for (k = 0; k < K_@i@; k++)
        net->theta@i@[k] = @p@_slot(DORMANT);
    net->dead@i@ = K_@i@;
    @p@_rewire@i@(net, 1);
    net->dead@i@ = 0;
{text}\
    for (k = 0; k < K_@i@; k++) {{
        double value = (double)(@p@_bits(key, COUNTER_@i@ + k) >> 11) * 0x1p-53;
        value = value * {bound};
        value = value * {hexadecimal((layer.total / layer.count) ** 0.5)};
        net->theta@i@[k] = @p@_slot({stored} | BITS(net->theta@i@[k]));
    }}
"""
