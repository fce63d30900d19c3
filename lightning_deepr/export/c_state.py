"""C text that saves a state, loads one, and checks the invariants."""

from __future__ import annotations

import zlib

from lightning_deepr.export.c_layers import fill
from lightning_deepr.export.c_plan import HEADER_BYTES, Plan


def fingerprint(plan: Plan) -> int:
    """A number of all that has to agree between the program that saves a state and the one that loads it."""
    words: list[object] = [plan.options.narrow, plan.options.untrained]
    for layer in plan.layers:
        words += [layer.rows, layer.columns, layer.count, layer.is_sparse, layer.relu, layer.bias is not None, layer.index]
        if layer.is_sparse and not plan.options.untrained:
            words += [layer.sign_seed, layer.first_step, layer.exceptions.tolist()]
    return zlib.crc32(repr(words).encode())


def state(plan: Plan) -> str:
    """The functions that save and load."""
    narrow = plan.options.narrow
    put: list[str] = []
    get: list[str] = []
    look: list[str] = []

    def add(count: str, save: str, load: str, check: str = "") -> None:
        head = f"    for (k = 0; k < {count}; k++)"
        put.append(f"{head}\n        {save}")
        get.append(f"{head}\n        {load}")
        look.append(f"{head} {{\n        {check}\n    }}" if check else f"    at += 4u * ({count});")

    for i in plan.sparse:
        if plan.options.target:
            put.append(
                f"    memcpy(&word, &net->alpha{i}, sizeof word);\n    @p@_put(buffer, &at, word, 8);\n"
                f"    @p@_put(buffer, &at, net->reborn{i}, 4);\n    @p@_put(buffer, &at, net->exposed{i}, 4);"
            )
            get.append(
                f"    word = @p@_get(buffer, &at, 8);\n    if (word == 0) word = FIRST_ALPHA;\n"
                f"    memcpy(&net->alpha{i}, &word, sizeof word);\n"
                f"    net->reborn{i} = (uint32_t)@p@_get(buffer, &at, 4);\n"
                f"    net->exposed{i} = (uint32_t)@p@_get(buffer, &at, 4);"
            )
            look.append("    at += 16;")
        else:
            put.append("    @p@_put(buffer, &at, 0, 8);\n    @p@_put(buffer, &at, 0, 8);")
            get.append("    at += 16;")
            look.append("    at += 16;")
    for i, layer in enumerate(plan.layers):
        number = {"i": i}
        if layer.is_sparse:
            size = plan.theta_bytes
            word = "net->theta@i@[k]" if narrow else "@p@_word(net->theta@i@[k])"
            kind = "uint16_t" if narrow else "uint32_t"
            value = f"({kind})@p@_get(buffer, &at, {size})"
            bad = f"(uint32_t)@p@_get(buffer, &at, {size}) == DORMANT"
            if not narrow:
                bad = "((uint32_t)@p@_get(buffer, &at, 4) & 0x7F800000u) == 0x7F800000u"
            add(
                "K_@i@",
                f"@p@_put(buffer, &at, {word}, {size});",
                f"net->theta@i@[k] = {value if narrow else f'@p@_float({value})'};",
                f"if ({bad})\n            return -1;",
            )
            width = plan.place_bytes[i]
            kind = "uint16_t" if width == 2 else "uint32_t"
            add(
                "K_@i@",
                f"@p@_put(buffer, &at, net->place@i@[k], {width});",
                f"net->place@i@[k] = ({kind})@p@_get(buffer, &at, {width});",
                f"const uint32_t place = (uint32_t)@p@_get(buffer, &at, {width});\n"
                "        if (place >> COLUMN_BITS_@i@ >= ROWS_@i@ || (place & ((1u << COLUMN_BITS_@i@) - 1u)) >= COLUMNS_@i@)\n"
                "            return -1;",
            )
        else:
            add(
                "ROWS_@i@ * COLUMNS_@i@",
                "@p@_put(buffer, &at, @p@_word(net->theta@i@[k]), 4);",
                "net->theta@i@[k] = @p@_float((uint32_t)@p@_get(buffer, &at, 4));",
            )
        if layer.bias is not None:
            add(
                "ROWS_@i@",
                "@p@_put(buffer, &at, @p@_word(net->bias@i@[k]), 4);",
                "net->bias@i@[k] = @p@_float((uint32_t)@p@_get(buffer, &at, 4));",
            )
        for parts in (put, get, look):
            parts[:] = [fill(part, **number) for part in parts]
    return fill(
        """\
static void @p@_put(uint8_t *buffer, size_t *at, uint64_t word, uint32_t bytes)
{
    for (; bytes > 0; bytes--, word >>= 8)
        buffer[(*at)++] = (uint8_t)(word & 0xFFu);
}

static uint64_t @p@_get(const uint8_t *buffer, size_t *at, uint32_t bytes)
{
    uint64_t word = 0;
    uint32_t shift;
    for (shift = 0; shift < 8u * bytes; shift += 8u)
        word |= (uint64_t)buffer[(*at)++] << shift;
    return word;
}

static uint32_t @p@_crc(const uint8_t *buffer, size_t size)
{
    uint32_t crc = UINT32_MAX, bit;
    size_t at;
    for (at = 0; at < size; at++) {
        crc ^= buffer[at];
        for (bit = 0; bit < 8u; bit++)
            crc = (crc >> 1) ^ ((crc & 1u) != 0 ? 0xEDB88320u : 0u);
    }
    return ~crc;
}

size_t @p@_save(const @p@_net *net, uint8_t *buffer, size_t size)
{
    size_t at = 0;
    uint32_t k;
    @word@
    if (net == NULL || buffer == NULL || size < @P@_STATE_BYTES)
        return 0;
    @p@_put(buffer, &at, STATE_MARK, 4);
    @p@_put(buffer, &at, STATE_NETWORK, 4);
    @p@_put(buffer, &at, @P@_STATE_BYTES, 4);
    @p@_put(buffer, &at, net->seed, 4);
    @p@_put(buffer, &at, net->step, 8);
    @p@_put(buffer, &at, 0, 4);
@put@
    @p@_put(buffer, &at, @p@_crc(buffer, at), 4);
    return at;
}

static int @p@_refuse(const uint8_t *buffer, size_t size)
{
    size_t at = 0;
    uint32_t k;
    if (buffer == NULL || size < @P@_STATE_BYTES || @p@_get(buffer, &at, 4) != STATE_MARK ||
        @p@_get(buffer, &at, 4) != STATE_NETWORK || @p@_get(buffer, &at, 4) != @P@_STATE_BYTES)
        return -1;
    at = @P@_STATE_BYTES - 4u;
    if (@p@_get(buffer, &at, 4) != @p@_crc(buffer, @P@_STATE_BYTES - 4u))
        return -1;
    at = @header@u;
@look@
    return 0;
}

int @p@_load(@p@_net *net, const uint8_t *buffer, size_t size)
{
    size_t at = 12;
    uint32_t k;
    @word@
    if (net == NULL || @p@_refuse(buffer, size) != 0)
        return -1;
    memset(net, 0, sizeof *net);
    net->seed = (uint32_t)@p@_get(buffer, &at, 4);
    net->step = @p@_get(buffer, &at, 8);
    at += 4;
@get@
    return 0;
}
""",
        word="uint64_t word;" if plan.options.target else "",
        put="\n".join(put),
        get="\n".join(get),
        look="\n".join(look),
        header=HEADER_BYTES - 4,
    )


def check(plan: Plan) -> str:
    """The function that checks the invariants: K exact, places inside and unique, signs those of their places."""
    slot = "uint16_t" if plan.slot_bytes == 2 else "uint32_t"
    text = f"""\
int @p@_check(@p@_net *net)
{{
    {slot} *const table = net->work.table;
"""
    for i in plan.sparse:
        text += fill(
            f"""\
    {{
        const uint64_t signs = @p@_sign_key@i@(net);
        uint32_t first, k, at;
        for (k = 0; k < K_@i@; k++) {{
            const uint32_t place = net->place@i@[k];
            if (BITS(net->theta@i@[k]) == DORMANT)
                return {10 * i + 1};
            if (place >> COLUMN_BITS_@i@ >= ROWS_@i@ || (place & ((1u << COLUMN_BITS_@i@) - 1u)) >= COLUMNS_@i@)
                return {10 * i + 2};
            if ((BITS(net->theta@i@[k]) & SIGN) != @p@_sign@i@(signs, place))
                return {10 * i + 3};
        }}
        for (first = 0; first < K_@i@; first += TABLE / 2) {{
            memset(table, 0xFF, sizeof net->work.table);
            for (k = first; k < K_@i@; k++) {{
                at = HASH(net->place@i@[k], {32 - (plan.table.bit_length() - 1)});
                for (; table[at] != FREE; at = (at + 1) % TABLE)
                    if (net->place@i@[table[at]] == net->place@i@[k])
                        return {10 * i + 4};
                if (k - first < TABLE / 2)
                    table[at] = ({slot})k;
            }}
        }}
    }}
""",
            i=i,
        )
    return text + "    return 0;\n}\n"
