"""The two files of the program that trains: the header, and the source put together from its parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from lightning_deepr.export import c_arithmetic, c_layers, c_state
from lightning_deepr.export.c_arithmetic import hexadecimal
from lightning_deepr.export.c_layers import fill
from lightning_deepr.export.c_names import guard_of
from lightning_deepr.export.c_plan import STACK_BYTES, Plan, packed
from lightning_deepr.training.schedules import L1_PLAIN

QUANTUM = 2.0**-12
"""The step of a theta of 16 bits: theta goes from 0 to 32,766 steps, which is just below 8."""


def header(plan: Plan) -> str:
    """Write the header."""
    options, layers = plan.options, plan.layers
    text = "\n".join(_comment(plan))
    text += """
#ifndef @guard@
#define @guard@

#include <stddef.h>
#include <stdint.h>

#define @P@_INPUTS @inputs@
#define @P@_OUTPUTS @outputs@
#define @P@_BATCH @batch@
#define @P@_CONNECTIONS @connections@
#define @P@_NET_BYTES @net_bytes@u   /* sizeof(@p@_net) */
#define @P@_STATE_BYTES @state_bytes@u /* the size of a saved state */

typedef @type@ @p@_input;@range@

typedef struct @p@_net {
@fields@
} @p@_net;

#ifdef __cplusplus
extern "C" {
#endif

/* Start @start@. All draws depend on the seed. */
void @p@_init(@p@_net *net, uint32_t seed);

/* The class of one sample x[@P@_INPUTS]; -1: an input is not finite. */
int @p@_predict(@p@_net *net, const @p@_input *x);

/* One step on x[@P@_BATCH][@P@_INPUTS] and labels[@P@_BATCH]: the gradient of the mean cross-entropy, L1, rewiring.
 * progress: of the training, from 0 to 1.@progress@
 * Returns the mean loss before the step. Returns -1, and changes nothing, if a label is no class, an input is not finite,
 * lr is not a finite number of at least 0, or progress is not in 0 ... 1. */
float @p@_train_step(@p@_net *net, const @p@_input *x, const uint16_t *labels, float lr, float progress);

/* Write the state into size bytes, at least @P@_STATE_BYTES. Returns the bytes written; 0: the buffer is too small. */
size_t @p@_save(const @p@_net *net, uint8_t *buffer, size_t size);

/* Continue from a saved state. Returns 0; or -1, and changes nothing: it is cut off, damaged or another network's. */
int @p@_load(@p@_net *net, const uint8_t *buffer, size_t size);

/* Connection `slot` of sparse layer `layer` (from 0 on, in the network's order of all layers): row * columns + column, and its
 * weight unless weight is NULL. Returns UINT32_MAX if there is none. */
uint32_t @p@_connection(const @p@_net *net, uint32_t layer, uint32_t slot, float *weight);

/* Check K, places and signs: 0, or 10 * layer + 1 (fewer than K), 2 (a place outside), 3 (a sign), 4 (a place twice). With
 * @P@_CHECK defined every step checks, and abort() ends the program at the first violation. */
int @p@_check(@p@_net *net);

#ifdef __cplusplus
}
#endif

#endif
"""
    start = "with random connections and weights" if options.untrained else "where the exported network was"
    return fill(
        text,
        guard=guard_of(f"{options.prefix}_net"),
        inputs=layers[0].columns,
        outputs=layers[-1].rows,
        batch=options.batch,
        connections=sum(layers[i].count for i in plan.sparse),
        net_bytes=plan.net_bytes,
        state_bytes=plan.state_bytes,
        type="float" if options.floats else "uint8_t",
        range="" if options.floats else " /* read as x / 255 */",
        fields="\n".join(f"    {line}" for line in _fields(plan)),
        start=start,
        progress=" alpha, the L1 term, follows from it." if options.target or options.l1[0] != options.l1[1] else " Not used.",
        P=options.prefix.upper(),
        p=options.prefix,
    )


def _comment(plan: Plan) -> Iterator[str]:
    layers, options = plan.layers, plan.options
    sizes = [layers[0].columns, *(layer.rows for layer in layers)]
    count, total = sum(layers[i].count for i in plan.sparse), sum(layers[i].total for i in plan.sparse)
    if options.target:
        alpha = re.sub(r"\*/", "", f"alpha by turnover, {options.target!r}")
    else:
        alpha = f"alpha {options.l1[0]:g}" + (f" to {options.l1[1]:g}" if options.l1[0] != options.l1[1] else "")
    yield f"/* DEEP R (Bellec et al. 2018, Algorithm 1) for a network {'-'.join(map(str, sizes))} with {count} of {total}"
    yield f" * connections, in batches of {options.batch}; {alpha}, T {options.temperature:g}. Written by lightning-deepr."
    yield " *"
    yield f" * RAM: {plan.net_bytes} bytes for one {options.prefix}_net, and at most {STACK_BYTES} bytes of stack:"
    for what, size in plan.parts.items():
        yield f" *     {size:>7}  {what}"
    yield f" * Flash: {plan.constant_bytes} bytes of constants, and the code.  A saved state: {plan.state_bytes} bytes. */"


def _fields(plan: Plan) -> Iterator[str]:
    """The fields of the struct, from those that are aligned to 8 bytes down to single bytes."""
    options = plan.options
    yield "uint64_t step; /* since the start or the export */"
    if options.target:
        yield from (f"double alpha{i};" for i in plan.sparse)
        yield from (f"uint32_t reborn{i}, exposed{i};" for i in plan.sparse)
    yield from (f"uint32_t dead{i};" for i in plan.sparse)
    yield "uint32_t seed;"
    yield "union {"
    yield f"    float values[{plan.work}]; /* outputs and their gradients */"
    yield f"    uint{8 * plan.slot_bytes}_t table[{plan.table}]; /* which draws are taken */"
    if any(2 * plan.layers[i].count > plan.layers[i].total for i in plan.sparse):
        window, best = _list_sizes(plan)
        yield "    struct {"
        yield f"        uint32_t taken[{window}];"
        yield f"        struct @p@_listed {{ uint32_t high, low, place; }} best[{best}];"
        yield "    } list; /* the same, in a layer of which more than half is connected */"
    yield "} work;"
    for i, layer in enumerate(plan.layers):
        if not layer.is_sparse or not options.narrow:
            yield f"float theta{i}[{layer.count}];"
        if layer.bias is not None:
            yield f"float bias{i}[{layer.rows}];"
        if plan.place_bytes[i] == 4:
            yield f"uint32_t place{i}[{layer.count}]; /* row << {plan.column_bits[i]} | column */"
    for i, layer in enumerate(plan.layers):
        if layer.is_sparse and options.narrow:
            yield f"uint16_t theta{i}[{layer.count}];"
        if plan.place_bytes[i] == 2:
            yield f"uint16_t place{i}[{layer.count}]; /* row << {plan.column_bits[i]} | column */"
    used = plan.parts
    counts = 12 + (16 * len(plan.sparse) if options.target else 0) + 4 * len(plan.sparse)
    if used["counts"] > counts:
        yield f"uint8_t unused[{used['counts'] - counts}]; /* the size is a multiple of 8 on every machine */"


def _list_sizes(plan: Plan) -> tuple[int, int]:
    """The words of the table of taken places, and the number of places that one pass finds."""
    largest = max(plan.layers[i].total for i in plan.sparse if 2 * plan.layers[i].count > plan.layers[i].total)
    window = min(-(-largest // 32), plan.work // 4)
    return window, (plan.work - window) // 3


def source(plan: Plan) -> str:
    """Write the source."""
    options, layers = plan.options, plan.layers
    lists = any(2 * layers[i].count > layers[i].total for i in plan.sparse)
    rejects = any(2 * layers[i].count <= layers[i].total for i in plan.sparse)
    parts = [
        f"/* Written by lightning-deepr; {options.prefix}_net.h describes the functions. */\n"
        f'#include "{options.prefix}_net.h"\n\n'
        "#include <string.h>\n#ifdef @P@_CHECK\n#include <stdlib.h>\n#endif\n",
        "/* Equal bits everywhere: a product is rounded before it is added. */\n"
        "#if defined(__clang__)\n#pragma STDC FP_CONTRACT OFF\n"
        '#elif defined(__GNUC__) && !defined(__STRICT_ANSI__)\n#pragma GCC optimize("fp-contract=off")\n#endif\n',
        "#ifndef @P@_MARK\n"
        "#define @P@_MARK(phase) /* 0: before forward, 1: backward, 2: rewiring, 3: the end; to count or to time */\n"
        "#endif\n",
        f"typedef char @p@_net_has_its_size[sizeof(@p@_net) == @P@_NET_BYTES ? 1 : -1];\n\n"
        f"#define TABLE {plan.table}u\n"
        "#define HASH(place, shift) (((place) * 2654435769u) >> (shift))\n"
        f"#define FREE {'UINT16_MAX' if plan.slot_bytes == 2 else 'UINT32_MAX'}\n"
        f"#define STATE_MARK 0x31525044u /* DPR1 */\n#define STATE_NETWORK 0x{c_state.fingerprint(plan):08x}u\n"
        + (f"#define WINDOW {32 * _list_sizes(plan)[0]}u\n#define BEST {_list_sizes(plan)[1]}u\n" if lists else "")
        + (f"#define FIRST_ALPHA UINT64_C(0x{_double_bits(L1_PLAIN):016x}) /* {L1_PLAIN:g} */\n" if options.target else ""),
        *(fill(c_layers.constants(plan, i), i=i) for i in range(len(layers))),
    ]
    if not options.floats:
        parts.append(_array("@p@_byte", "float", (np.arange(256).astype(np.float32) / np.float32(255))))
    if not options.untrained:
        parts += _start_arrays(plan)
    parts += [c_layers.SKIP, c_arithmetic.bits_of_float(), c_arithmetic.draws()]
    parts += [c_arithmetic.remainder()] if rejects else []
    parts += [c_arithmetic.softmax()]
    steered = options.target is not None
    if options.temperature or steered:
        parts.append(c_arithmetic.logarithm())
    if options.temperature or (options.target is not None and options.target.shape == "cosine"):
        parts.append(c_arithmetic.cosine())
    if steered:
        parts.append(c_arithmetic.exponential())
    parts += [c_arithmetic.normal()] if options.temperature else []
    parts.append(fill(c_layers.storage(plan), quantum=f"{QUANTUM:.9g}", quanta=f"{1 / QUANTUM:.1f}"))
    parts.append(c_layers.stream_keys(plan))
    for i, layer in enumerate(layers):
        parts += [c_layers.forward(plan, i, samples) for samples in sorted({1, options.batch})]
        parts.append(c_layers.backward(plan, i))
        if layer.is_sparse:
            parts += [c_layers.sign_of(plan, i), c_layers.rewire(plan, i)]
        parts = [fill(part, i=i) for part in parts]
    parts += [
        _loss(plan),
        _steering(plan),
        _decrement(),
        _inputs(plan),
        c_state.check(plan),
        _init(plan),
        _predict(plan),
        _step(plan),
    ]
    parts += [c_state.state(plan), _connection(plan)]
    return fill("\n".join(part for part in parts if part), P=options.prefix.upper(), p=options.prefix)


def _double_bits(value: float) -> int:
    return int(np.array(value, np.float64).view(np.uint64))


def _start_arrays(plan: Plan) -> list[str]:
    """The state that the exported network was in, as constants."""
    parts = []
    for i, layer in enumerate(plan.layers):
        if layer.is_sparse:
            if plan.options.narrow:
                steps = np.clip(np.rint(layer.theta.astype(np.float64) / QUANTUM), 0, 32766).astype(np.uint16)
                parts.append(_array(f"@p@_start_theta{i}", "uint16_t", steps | (layer.negative.astype(np.uint16) << 15)))
            else:
                parts.append(_array(f"@p@_start_theta{i}", "float", np.where(layer.negative, -layer.theta, layer.theta)))
            kind = "uint16_t" if plan.place_bytes[i] == 2 else "uint32_t"
            parts.append(_array(f"@p@_start_place{i}", kind, packed(plan, i, layer.places)))
            if len(layer.exceptions):
                parts.append(_array(f"@p@_exceptions{i}", "uint32_t", layer.exceptions))
        else:
            assert layer.weight is not None
            parts.append(_array(f"@p@_start_theta{i}", "float", layer.weight.reshape(-1)))
        if layer.bias is not None:
            parts.append(_array(f"@p@_start_bias{i}", "float", layer.bias))
    return parts


def _array(name: str, kind: str, values: np.ndarray) -> str:
    numbers = [_number(value) for value in values.tolist()] if kind == "float" else [f"{value}u" for value in values.tolist()]
    lines = [f"static const {kind} {name}[{len(numbers)}] = {{"]
    step = 8 if kind == "float" else 12
    lines += ["    " + ", ".join(numbers[start : start + step]) + "," for start in range(0, len(numbers), step)]
    return "\n".join([*lines, "};", ""])


def _number(value: float) -> str:
    """Write a float literal: nine digits reproduce every float32, and the sign of a zero is kept."""
    text = f"{value:.9g}"
    return text + ("f" if any(mark in text for mark in ".e") else ".0f")


def _loss(plan: Plan) -> str:
    one = plan.options.batch == 1
    mean = "" if one else "\n            out[k * @P@_BATCH + b] = out[k * @P@_BATCH + b] / (float)@P@_BATCH;"
    total = "loss" if one else "loss / (float)@P@_BATCH"
    return f"""\
/* The mean cross-entropy of softmax; the outputs become its gradient. */
static float @p@_loss(float *out, const uint16_t *labels)
{{
    float loss = 0.0f;
    uint32_t b, k;
    for (b = 0; b < @P@_BATCH; b++) {{
        float largest = out[b], sum = 0.0f, own;
        for (k = 1; k < @P@_OUTPUTS; k++)
            if (out[k * @P@_BATCH + b] > largest)
                largest = out[k * @P@_BATCH + b];
        own = out[labels[b] * @P@_BATCH + b] - largest;
        for (k = 0; k < @P@_OUTPUTS; k++) {{
            const float below = out[k * @P@_BATCH + b] - largest;
            const float power = @p@_exp(below);
            out[k * @P@_BATCH + b] = power;
            sum += power;
        }}
        for (k = 0; k < @P@_OUTPUTS; k++) {{
            out[k * @P@_BATCH + b] = out[k * @P@_BATCH + b] / sum;
            if (k == labels[b])
                out[k * @P@_BATCH + b] -= 1.0f;{mean}
        }}
        sum = @p@_log(sum);
        sum = sum - own;
        loss += sum;
    }}
    return {total};
}}
"""


def _steering(plan: Plan) -> str:
    target = plan.options.target
    if target is None:
        return ""
    share = {
        "cosine": "(1.0 + @p@_cos_of_turns(progress / 2.0)) / 2.0",
        "linear": "1.0 - progress",
        "constant": "1.0",
    }[target.shape]
    return f"""\
/* alpha follows the turnover: at the end of an interval it is multiplied by a power of (wanted / seen). */
static void @p@_steer(double *alpha, uint32_t *reborn, uint32_t *exposed, double progress)
{{
    const double first = {hexadecimal(L1_PLAIN)}, limit = {hexadecimal(target.limit)};
    const double lowest = {hexadecimal(L1_PLAIN / target.within)}, highest = {hexadecimal(L1_PLAIN * target.within)};
    const double wanted = {hexadecimal(target.start)} * ({share});
    double change = limit;
    (void)progress, (void)first;
    if (*reborn == 0 && wanted * (double)*exposed < 1.0)
        return;
    if (*reborn > 0 && wanted > 0.0)
        change = {hexadecimal(target.gain)} * @p@_log_double(wanted / ((double)*reborn / (double)*exposed));
    else if (*reborn > 0)
        change = -limit;
    change = change < -limit ? -limit : change > limit ? limit : change;
    *alpha *= @p@_exp_double(change);
    *alpha = *alpha < lowest ? lowest : *alpha > highest ? highest : *alpha;
    *reborn = *exposed = 0;
}}
"""


def _decrement() -> str:
    return """\
static float @p@_decrement(float lr, double alpha)
{
    const double product = (double)lr * alpha;
    return (float)product;
}
"""


def _inputs(plan: Plan) -> str:
    if not plan.options.floats:
        return ""
    return """\
static int @p@_finite(const @p@_input *x, uint32_t size)
{
    uint32_t k;
    for (k = 0; k < size; k++)
        if ((@p@_word(x[k]) & 0x7F800000u) == 0x7F800000u)
            return 0;
    return 1;
}
"""


def _init(plan: Plan) -> str:
    lines = []
    for i, layer in enumerate(plan.layers):
        if plan.options.untrained:
            lines.append(fill(c_layers.start_untrained(plan, i), i=i))
            continue
        names = ["theta", *(["place"] if layer.is_sparse else []), *(["bias"] if layer.bias is not None else [])]
        lines += [f"    memcpy(net->{name}{i}, @p@_start_{name}{i}, sizeof net->{name}{i});" for name in names]
    if plan.options.target:
        lines += [f"    memcpy(&net->alpha{i}, &first, sizeof first);" for i in plan.sparse]
    text = "void @p@_init(@p@_net *net, uint32_t seed)\n{\n"
    if plan.options.target:
        text += "    const uint64_t first = FIRST_ALPHA;\n"
    if plan.options.untrained:
        text += "    uint64_t key;\n    uint32_t k;\n"
    return text + "    memset(net, 0, sizeof *net);\n    net->seed = seed;\n" + "\n".join(lines).rstrip() + "\n}\n"


def _forwards(plan: Plan, suffix: str, scale: str) -> str:
    text, source = "", "x"
    for i in range(len(plan.layers)):
        target = f"work + {plan.outputs[i] // plan.options.batch}u * {scale}"
        text += f"    @p@_forward{i}{suffix}(net, {source}, {target});\n"
        source = target
    return text


def _predict(plan: Plan) -> str:
    suffix = "" if plan.options.batch == 1 else "_one"
    refusal = "    if (!@p@_finite(x, @P@_INPUTS))\n        return -1;\n" if plan.options.floats else ""
    return f"""\
int @p@_predict(@p@_net *net, const @p@_input *x)
{{
    float *const work = net->work.values;
    const float *const out = work + {plan.outputs[-1] // plan.options.batch}u;
    uint32_t k, best = 0;
{refusal}{_forwards(plan, suffix, "1u")}    for (k = 1; k < @P@_OUTPUTS; k++)
        if (out[k] > out[best])
            best = k;
    return (int)best;
}}
"""


def _step(plan: Plan) -> str:
    options, last = plan.options, len(plan.layers) - 1
    text = """\
float @p@_train_step(@p@_net *net, const @p@_input *x, const uint16_t *labels, float lr, float progress)
{
    float *const work = net->work.values;
    float loss;
    uint32_t b;
    if (!(lr >= 0.0f && lr <= 3.0e38f && progress >= 0.0f && progress <= 1.0f))
        return -1.0f;
    for (b = 0; b < @P@_BATCH; b++)
        if (labels[b] >= @P@_OUTPUTS)
            return -1.0f;
"""
    if options.floats:
        text += "    if (!@p@_finite(x, @P@_BATCH * @P@_INPUTS))\n        return -1.0f;\n"
    text += "    @P@_MARK(0);\n" + _forwards(plan, "", "@P@_BATCH") + "    @P@_MARK(1);\n"
    text += f"    loss = @p@_loss(work + {plan.outputs[last]}u, labels);\n"
    begin, end = options.l1
    if options.target is None:
        alpha = hexadecimal(begin)
        if begin != end:
            alpha += f" + {hexadecimal(end - begin)} * (double)progress"
        text += f"    const float decrement = @p@_decrement(lr, {alpha});\n"
    if options.temperature:
        text += f"    const double noise = @p@_sqrt(2.0 * (double)lr * {hexadecimal(options.temperature)});\n"
    for i in range(last, -1, -1):
        layer = plan.layers[i]
        source = f"work + {plan.outputs[i - 1]}u" if i > 0 else "x"
        arguments = [source, f"work + {plan.deltas[i]}u"] + ([f"work + {plan.deltas[i - 1]}u"] if i > 0 else []) + ["lr"]
        if layer.is_sparse:
            arguments.append(f"@p@_decrement(lr, net->alpha{i})" if options.target else "decrement")
            arguments += ["noise"] if options.temperature else []
        text += f"    @p@_backward{i}(net, {', '.join(arguments)});\n"
    text += "    @P@_MARK(2);\n"
    if options.target:
        for i in plan.sparse:
            text += f"    net->reborn{i} += net->dead{i};\n    net->exposed{i} += K_{i};\n"
    for i in plan.sparse:
        text += f"    if (net->dead{i} > 0)\n        @p@_rewire{i}(net, 0);\n"
    text += "    @P@_MARK(3);\n    net->step++;\n"
    if options.target:
        text += f"    if (net->step % {options.target.interval}u == 0) {{\n"
        for i in plan.sparse:
            text += f"        @p@_steer(&net->alpha{i}, &net->reborn{i}, &net->exposed{i}, (double)progress);\n"
        text += "    }\n"
    return text + "#ifdef @P@_CHECK\n    if (@p@_check(net) != 0)\n        abort();\n#endif\n    return loss;\n}\n"


def _connection(plan: Plan) -> str:
    text = "uint32_t @p@_connection(const @p@_net *net, uint32_t layer, uint32_t slot, float *weight)\n{\n"
    for i in plan.sparse:
        text += fill(
            """\
    if (layer == @i@u && slot < K_@i@) {
        if (weight != NULL)
            *weight = WEIGHT(net->theta@i@[slot]);
        return (net->place@i@[slot] >> COLUMN_BITS_@i@) * COLUMNS_@i@ + (net->place@i@[slot] & ((1u << COLUMN_BITS_@i@) - 1u));
    }
""",
            i=i,
        )
    return text + "    return UINT32_MAX;\n}\n"


def sizes_of(plan: Plan) -> list[tuple[str, int, int]]:
    """List name, stored weights and bytes of each layer."""
    return [
        (layer.name, layer.count, layer.count * (plan.theta_bytes + plan.place_bytes[i] if layer.is_sparse else 4))
        for i, layer in enumerate(plan.layers)
    ]


def is_finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)
