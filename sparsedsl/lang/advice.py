"""What errors add to what went wrong: the name that was meant, and where a thing known from elsewhere is said here."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, TypeVar, cast

from sparsedsl.errors import ArgumentError, PatternError

__all__ = ["answer_for", "answering", "check_word", "meant", "public_only", "shown", "surplus", "way_in"]

F = TypeVar("F", bound=Callable[..., Any])

_GROUPS = "leave it out: fewer key/value heads than query heads are shared by themselves"
_LISTS = "leave it out: the lists of tiles are made from the pattern; a FlexAttention mask_mod is read by sd.trace_mask(mask_mod)"
_CAUSAL = "the causal mask is part of the pattern, as in sd.compile(sd.kv_idx <= sd.q_idx)"
_TABLE = (
    "the pattern is the mask. Of a boolean tensor declare a table: keep = sd.table('keep', dtype=bool), "
    "sd.compile(keep[sd.q_idx, sd.kv_idx]), and pass keep=tensor"
)
_SCALE = "here it is scale="
# Arguments of torch's scaled_dot_product_attention and flex_attention, and of flash-attn -> what to write here.
ELSEWHERE = {
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "attn_mask": _TABLE,
    "attention_mask": _TABLE,
    "mask": _TABLE,
    "key_padding_mask": _TABLE,
    "block_mask": _LISTS,
    "mask_mod": _LISTS,
    "score_mod": "the score is part of the pattern: sd.attend(mask, score=sd.trace_score(score_mod))",
    "dropout_p": "dropout of attention weights is not part of a pattern; leave it out, or drop tokens or heads outside",
    "dropout": "dropout of attention weights is not part of a pattern; leave it out, or drop tokens or heads outside",
    "enable_gqa": _GROUPS,
    "kernel_options": "leave it out: sizes of tiles are chosen and tuned by the backend (docs/tuning.md); sd.compile(..., backend=)",
    "return_aux": "here it is return_lse=True",
    "softmax_scale": _SCALE,
    "sm_scale": _SCALE,
    "window_size": "the window is part of the pattern: sd.patterns.sliding_window(n)",
    "softcap": "the soft cap is part of the pattern: sd.attend(mask, score=sd.patterns.softcap(cap))",
    "alibi_slopes": "ALiBi is part of the pattern: sd.attend(mask, score=sd.patterns.alibi(heads))",
    "cu_seqlens": "documents are part of the pattern: sd.patterns.documents()",
    "offset": "here it is q_offset=",
    "stride": "windows that overlap are made by sd.summary(k, 32, stride=16); blocks lie side by side",
    "beta": "the delta rule is that of sd.linear(decay, beta=...)",
}


def meant(word: object, known: Iterable[str]) -> str:
    """``". Did you mean 'x'?"`` for the known name nearest to ``word``; nothing where none is near.

    >>> meant("tilde", ["auto", "tiled"])
    ". Did you mean 'tiled'?"
    """
    near = difflib.get_close_matches(str(word).strip("'"), list(known), n=1, cutoff=0.6)
    return f". Did you mean {near[0]!r}?" if near else ""


def public_only(
    module: str, names: Collection[str], what: str = "attribute"
) -> tuple[Callable[[str], NoReturn], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a module that shows ``names`` and says which of them was meant by another.

    >>> getter, lister = public_only("shop", ["apples", "pears"])
    >>> lister()
    ['apples', 'pears']
    >>> getter("aples")
    Traceback (most recent call last):
        ...
    AttributeError: module 'shop' has no attribute 'aples'; public names are apples, pears. Did you mean 'apples'?
    """

    def missing(name: str) -> NoReturn:
        raise AttributeError(no_attribute(module, name, names, what))

    return missing, lambda: sorted(names)


def no_attribute(module: str, name: str, names: Collection[str], what: str = "attribute") -> str:
    """What is said of a name that a module does not have."""
    return f"module {module!r} has no {what} {name!r}; public names are {', '.join(sorted(names))}{meant(name, names)}"


def check_word(where: str, value: object, words: Collection[str]) -> str:
    """``value``, which must be one of a few ``words``."""
    if not isinstance(value, str) or value not in words:
        wrong = repr(value) if isinstance(value, str) else shown(value)
        raise PatternError(f"{where} must be one of {', '.join(map(repr, words))}; got {wrong}{meant(wrong, words)}")
    return value


def surplus(names: Iterable[str], known: Iterable[str], takes: str) -> str:
    """The message about arguments by name that are not ``known``; ``takes``: what is, in words.

    >>> surplus(["dcos"], ["docs"], "the pattern reads the table docs")
    "unexpected argument dcos: the pattern reads the table docs. Did you mean 'docs'?"
    >>> surplus(["offset"], ["docs"], "the pattern reads the table docs")
    'unexpected argument offset: here it is q_offset='
    """
    names, known = sorted(names), list(known)
    if len(names) == 1 and names[0] in ELSEWHERE:  # of another library: what to write here says it all
        return f"unexpected argument {names[0]}: {ELSEWHERE[names[0]]}"
    more = "".join(f". {name}: {ELSEWHERE[name]}" if name in ELSEWHERE else meant(name, known) for name in names)
    return f"unexpected argument{'s' * (len(names) > 1)} {', '.join(names)}: {takes}{more}"


def shown(value: object) -> str:
    """A wrong value in a message: tensors and arrays by dtype and shape, others as written, cut where it is long."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    text = repr(value)
    return f"{text if len(text) <= 200 else text[:200] + '...'} ({kind})"


def way_in(value: object) -> str:
    """What to write for a value that is no expression, but stands where one was wanted; begins with a full stop, or is empty."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return (
            ". Tensors are read through a table: keep = sd.table('keep', dtype=bool), keep[sd.q_idx, sd.kv_idx] in the pattern, and "
            "the tensor with the call: attn(q, k, v, keep=tensor)"
        )
    if kind == "Table":
        return ". A table must be read with indices: t[q_idx, kv_idx]"
    if kind == "BlockMask":
        return ". What a FlexAttention BlockMask was made of is read by sd.trace_mask(block_mask.mask_mod)"
    if kind == "Pattern":
        return ". A Pattern is a whole attention; its parts are pattern.mask and pattern.score"
    if isinstance(value, str):
        return ". The text form of a pattern is read by sd.parse(text)"
    if hasattr(value, "pattern") or hasattr(value, "program"):
        return ". It is compiled already; what it was made of is its .pattern or .program"
    if isinstance(value, type) or not callable(value) or kind == "Score":  # which is called as a decorator
        return ""
    name, wanted = getattr(value, "__name__", "function"), _arguments(value)
    if str(getattr(value, "__module__", "")).startswith("sparsedsl") or not wanted:
        return f". {name} is a function that makes one: call it, {name}({', '.join(wanted)})"
    if len(wanted) == 5:
        return f". To use a FlexAttention score function write sd.trace_score({name})"
    return ". To use a FlexAttention mask function write sd.trace_mask(function)"


def answering(function: F, name: str = "") -> F:
    """``function``, but a call whose arguments do not fit its signature gets an :class:`ArgumentError`. ``name``: what messages call it.

    Nothing is done before a call has failed. It takes the place of ``function`` in the module that defines it, by whose name it is pickled.
    """

    if getattr(function, "answers", False):
        return function
    home = vars(sys.modules[function.__module__])
    known = home.get(function.__name__)
    if getattr(known, "__wrapped__", None) is function:
        return cast(F, known)  # by another of its names

    @functools.wraps(function)
    def called(*values: object, **words: Any) -> Any:
        try:
            return function(*values, **words)
        except TypeError as error:
            if isinstance(error, ArgumentError):
                raise
            signature = inspect.signature(function)
            try:
                signature.bind(*values, **words)
            except TypeError as wrong:
                raise ArgumentError(_misfit(name or function.__name__, signature, words, wrong)) from None
            raise

    vars(called)["answers"] = True
    if home.get(function.__name__) is function:
        home[function.__name__] = called
    return called  # type: ignore[return-value]


def answer_for(names: dict[str, Any], public: Iterable[str]) -> None:
    """:func:`answering` in place of every public function of a module, whose globals ``names`` are, and of what makes its dataclasses."""
    for name in public:
        value = names[name]
        if isinstance(value, types.FunctionType):
            names[name] = answering(value)
        elif dataclasses.is_dataclass(value) and "__init__" in vars(value):
            value.__init__ = answering(value.__init__, name)  # type: ignore[misc, method-assign]


def _misfit(name: str, signature: inspect.Signature, words: Iterable[str], wrong: TypeError) -> str:
    known = [word for word in signature.parameters if word != "self"]
    unknown = [word for word in words if word not in known]
    if unknown:
        return f"{name}(): " + surplus(unknown, known, "it takes " + ", ".join(known))
    # Without types: they are strings to `signature`, which shows them in quotes.
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    own = signature.replace(parameters=bare, return_annotation=signature.empty)
    return f"{name}(): {wrong}. It is called as {name}{own}"


def _arguments(function: Any) -> list[str]:
    """The arguments a call must give."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["..."]
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
