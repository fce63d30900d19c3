"""Names that a C or C++ compiler takes for something else."""

from __future__ import annotations

import re

# C99, C11 and C23 (without those that begin with an underscore, which no name here does)
_C = """
    alignas alignof auto bool break case char const constexpr continue default do double else enum extern false float for goto
    if inline int long nullptr register restrict return short signed sizeof static static_assert struct switch thread_local
    true typedef typeof typeof_unqual union unsigned void volatile while asm fortran
"""
# C++26, with its alternative tokens
_CPP = """
    and and_eq bitand bitor catch char8_t char16_t char32_t class co_await co_return co_yield compl concept const_cast consteval
    constinit contract_assert decltype delete dynamic_cast explicit export final friend import module mutable namespace new
    noexcept not not_eq operator or or_eq override private protected public reinterpret_cast requires static_cast template this
    throw try typeid typename using virtual wchar_t xor xor_eq
"""
# What compilers and the headers that a program includes define at file scope, as macros or otherwise.
_LIBRARY = """
    main linux unix i386 near far huge interrupt NULL EOF BUFSIZ FILE TRUE FALSE errno assert offsetof complex imaginary I
    stdin stdout stderr size_t ssize_t ptrdiff_t va_list max_align_t time_t clock_t div_t ldiv_t fpos_t
    abort abs acos acosh asctime asin asinh atan atan2 atanh atexit atof atoi atol atoll bsearch calloc cbrt ceil clearerr clock
    copysign cos cosh ctime difftime div erf erfc exit exp exp2 expm1 fabs fclose fdim feof ferror fflush fgetc fgetpos fgets
    floor fma fmax fmin fmod fopen fprintf fputc fputs fread free freopen frexp fscanf fseek fsetpos ftell fwrite gamma getc
    getchar getenv gets gmtime hypot ilogb index j0 j1 jn labs ldexp ldiv lgamma llabs lldiv llrint llround localeconv
    localtime log log10 log1p log2 logb longjmp lrint lround malloc mblen mbstowcs mbtowc memchr memcmp memcpy memmove memset
    mktime modf nan nearbyint nextafter nexttoward perror pow printf putc putchar puts qsort raise rand read realloc remainder
    remove remquo rename rewind rindex rint round scalbln scalbn scanf setbuf setjmp setlocale setvbuf signal sin sinh sprintf
    sqrt srand sscanf strcat strchr strcmp strcoll strcpy strcspn strerror strftime strlen strncat strncmp strncpy strpbrk
    strrchr strspn strstr strtod strtof strtok strtol strtold strtoll strtoul strtoull strxfrm system tan tanh tgamma time
    tmpfile tmpnam trunc ungetc vfprintf vprintf vsprintf wcstombs wctomb write y0 y1 yn
"""
_KEYWORDS, _TAKEN = frozenset(f"{_C} {_CPP}".split()), frozenset(_LIBRARY.split())
_STDINT = re.compile(r"u?int\w*_t|(U?INT|PTRDIFF|SIG_ATOMIC|SIZE|WCHAR|WINT)\w*_(MAX|MIN|C|WIDTH)")


def check_name(name: object) -> str:
    """Check the name of an exported function, which begins all other names of its header.

    Raises:
        ValueError: it is no C identifier, or C or C++ take it for something else.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"name: expected a C identifier, found {name!r}.")
    for what, taken in (
        ("a keyword of C or C++", name in _KEYWORDS),
        ("a name of the C library or of compilers", name in _TAKEN or _STDINT.fullmatch(name) is not None),
        ("reserved in C++, which keeps two underscores together for itself", "__" in name or name.endswith("_")),
    ):
        if taken:
            raise ValueError(f"name: expected a name that is free in C and C++ (such as net), found {name!r}, {what}.")
    return name


def guard_of(name: str) -> str:
    """Return the macro that keeps a header from being read twice: with the package's name, and in the letters of ``name``.

    ``NET_H`` alone could be another header's, and would be that of `net` and of `Net`: the second would be skipped in silence.
    """
    return f"LIGHTNING_DEEPR_{name}_H"
