"""Which group does a parameter belong to?

A label for each leaf of the parameters, as ``optax.partition`` takes them: from regular
expressions on the leaf's path, or its depth in the network.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import optax

from optax_superconv import _checks, _trees
from optax_superconv._checks import listed
from optax_superconv._trees import LabelFn, Labels


def _regex(name: str, pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(
            f"`{name}` must be a regular expression, got {pattern!r} of type "
            f"{type(pattern).__name__}."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{name}` must be a regular expression, got {pattern!r}: {error}."
        ) from None


def _regexes(name: str, patterns: Any) -> list[re.Pattern[str]]:
    one = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    return [_regex(name, pattern) for pattern in ([patterns] if one else patterns)]


def label_by_path(
    rules: Sequence[tuple[str, str | int]],
    *,
    unmatched_rules: Literal["error", "warn"] = "error",
) -> LabelFn:
    """Labels parameters by regular expressions on their paths; the first match wins.

    A path is the names from the root to the leaf, ``encoder/block_3/attention/kernel``:
    keys, attributes and indices, the same at ``init`` and ``update`` in every container
    that JAX knows. An expression must match the whole path.

    Args:
      rules: Pairs ``(expression, label)``, at least one, tried in order. An expression
        is a regular expression. Labels are all strings or all integers. A last rule
        ``(".*", label)`` covers what is left.
      unmatched_rules: What happens if a rule labels nothing, since most such rules are
        misspelt: ``"error"``, or ``"warn"`` for rules that serve several networks. (It
        does nothing where ``optax.masked`` or ``optax.partition`` hide a part of the
        parameters.)

    Returns:
      A function ``params -> labels``, for ``param_labels`` here and in
      ``optax.partition``. The labels are in the containers of the parameters.

    Raises:
      ValueError: When the function is called, if no rule covers a leaf. The message
        lists these leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> params = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
      ...           "head": {"kernel": jnp.ones((2, 1))}}
      >>> label = osc.label_by_path([("head/.*", "head"), (".*", "body")])
      >>> label(params)
      {'encoder': {'bias': 'body', 'kernel': 'body'}, 'head': {'kernel': 'head'}}

    References:
      Beyer, Zhai and Kolesnikov, `Big Vision
      <https://github.com/google-research/big_vision>`_, 2022: rules of this form.
    """
    _checks.choice("unmatched_rules", unmatched_rules, ("error", "warn"))
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"`rules` must be pairs of an expression and a label, got {rules!r}."
        )
    rules = list(rules)
    _checks.require(bool(rules), "rules", "at least one pair", rules)
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(
                f"`rules` must be pairs of an expression and a label, got {rule!r}."
            )
    patterns = [_regex("rules", pattern) for pattern, _ in rules]
    _trees.check_labels((label for _, label in rules), "rules")

    def label_fn(params: optax.Params) -> Labels:
        used, uncovered = set(), []

        def label(path: str, leaf: Any) -> Any:
            matching = (k for k, p in enumerate(patterns) if p.fullmatch(path))
            first = next(matching, None)
            if first is not None:
                used.add(first)
            if leaf is None or _trees.is_hole(leaf):
                return leaf
            if first is None:
                uncovered.append(path)
                return None
            return rules[first][1]

        labels = _trees.map_with_paths(label, params, holes=True)
        idle = [p.pattern for k, p in enumerate(patterns) if k not in used]
        check_idle = idle and used | set(uncovered) and not _trees.is_masked(params)
        if uncovered:
            also = f" (rules that match nothing: {listed(idle)})" if check_idle else ""
            raise ValueError(
                f"`rules` must cover every parameter, got none for {listed(uncovered)}"
                f"{also}. A rule must match the whole path; a last rule ('.*', label) "
                "covers the rest."
            )
        if check_idle:
            message = (
                "`rules` must each label a parameter, got none for "
                f"{listed(idle)}: no path matches, or earlier rules take them all. The "
                f"paths are {listed(_trees.paths_of(params))}."
            )
            if unmatched_rules == "error":
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return labels

    return label_fn


# What the layers around the blocks are usually called, tried from the left on every
# name in a path. "unembed" and "embed_out" are heads, so heads are tried first.
_HEAD = (
    r"heads?|\w+_head|head_\w+|classifier|\w+_classifier|fc|fc_norm|(\w+_)?logits(_\w+)?"
    r"|out|output|output_(layer|projection|proj)|unembed(ding)?|embed_out|pooler"
    r"|predictions?|(visual|text)_projection"
)
_STEM = (
    r"(\w*_)?(pos|patch|tok|token)?_?embed(s|ding|dings|der)?(_(tokens?|input|norm))?"
    r"|stem|\w+_stem|stem_\w+|cls|(cls|class|dist|mask|reg|register)_tokens?"
    r"|tokens?|positions?|wte|wpe|rel_pos_bias"
    r"|conv_proj|norm_pre|pre_norm|ln_pre|pre_layer_?norm|pre_layrnorm"
)
_NORM = r"(\w+_)?(layer_?|rms_?)?norm(_\w+)?|ln|ln_(f|final|post)"
_NUMBERED = r".*?(\d+)"


def _place(name: str, is_leaf: bool) -> tuple[str, int] | None:
    """What a name says about depth: a stem, a head, a final norm, or a number."""
    word = name.lower()
    if word == "cls" and not is_leaf:  # A token in vision, BERT's head in language.
        return "head", 0
    if re.fullmatch(_HEAD, word):
        return "head", 0
    if re.fullmatch(rf"({_STEM})(_\d+)?", word):
        return "stem", 0
    if numbered := re.fullmatch(_NUMBERED, word):
        return "block", int(numbered[1])
    return ("norm", 0) if re.fullmatch(_NORM, word) else None


def label_by_depth(
    pattern: str | None = None,
    *,
    stem: str | Sequence[str] = (),
    head: str | Sequence[str] = (),
    final_norm: Literal["last_block", "head"] = "last_block",
) -> LabelFn:
    r"""Labels parameters by their depth, 0 nearest the input, for layer-wise rates.

    The number of a parameter's block is the first number that ends a name in its path:
    3 in ``block_3/kernel``, ``layers/3/kernel``, ``encoder/Conv_3/kernel``. Around the
    blocks stand a stem (patch, word and position embeddings, class tokens), a final
    norm and a head, known by their usual names; whichever such name or number comes
    first in the path decides. Depths are, as in timm's vision transformers: the stem 0,
    then the blocks in the order of their numbers, the final norm with the last block,
    the head one above. A 12-block transformer has 14 groups.

    Check the result with :func:`describe_groups`: names can mislead. Where lists number
    on their own (``Conv_0``, ``Conv_1``, ``Dense_0``) there is a warning; give a
    pattern or a ``head`` then.

    Args:
      pattern: A regular expression with a group that finds the number, as ``re.search``
        does, such as ``r"stages/(\d+)"``. None is the first number.
      stem: A regular expression or several, for what else is nearest the input. An
        expression that matches a whole path, or a whole beginning of it
        (``"backbone/conv1"``), goes before every name and number. ``()`` adds nothing.
      head: A regular expression or several, for what else is above the blocks. They
        match like those of ``stem``. ``()`` adds nothing.
      final_norm: Where a norm outside the blocks belongs: ``"last_block"`` as in timm,
        or ``"head"`` as in the code of BEiT and MAE.

    Returns:
      A function ``params -> labels`` with integers 0, 1, 2, ... without gaps, in the
      containers of the parameters. (Where ``optax.masked`` hides leaves, their depths
      are counted too.)

    Raises:
      ValueError: When the function is called, if a path has neither a number nor a
        known name. The message lists these paths.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_superconv as osc
      >>> leaf = jnp.ones(2)
      >>> params = {"patch_embed": leaf, "blocks": [leaf, leaf], "norm": leaf,
      ...           "head": leaf}
      >>> osc.label_by_depth()(params)
      {'blocks': [1, 2], 'head': 3, 'norm': 2, 'patch_embed': 0}

    References:
      Clark et al., `ELECTRA <https://arxiv.org/abs/2003.10555>`_, 2020; Bao et al.,
      `BEiT <https://arxiv.org/abs/2106.08254>`_, 2022 (layer-wise decay); Wightman,
      `PyTorch Image Models <https://github.com/huggingface/pytorch-image-models>`_,
      2019, ``group_matcher`` of its vision transformer.
    """
    _checks.choice("final_norm", final_norm, ("last_block", "head"))
    number = None if pattern is None else _regex("pattern", pattern)
    if number is not None:
        rule = "a regular expression with a group for the number"
        _checks.require(number.groups > 0, "pattern", rule, repr(pattern))
    named = {"stem": _regexes("stem", stem), "head": _regexes("head", head)}

    def place(path: str) -> tuple[str, int, str] | None:
        """Where a path belongs, its number, and what stands before the number."""
        names = ["/".join(begin) for begin in _trees.begins_of((*path.split("/"),))[1:]]
        for where, patterns in named.items():
            if any(p.fullmatch(begin) for p in patterns for begin in names):
                return where, 0, ""
        if number is not None and (found := number.search(path)):
            digits = next((g for g in found.groups() if g and g.isdecimal()), None)
            if digits is not None:
                return "block", int(digits), ""
        for begin in names:
            found_here = _place(begin.rsplit("/", 1)[-1], begin == path)
            if found_here is None or (found_here[0] == "block" and number is not None):
                continue
            where, index = found_here
            # Leaves that are numbered themselves, w_0 and b_0, lie side by side.
            before = "" if begin == path else begin.rstrip("0123456789")
            return where, index, before
        return None

    def label_fn(params: optax.Params) -> Labels:
        places: dict[str, tuple[str, int, str]] = {}
        lost: list[str] = []

        def find(path: str, leaf: Any) -> None:
            found = place(path)
            if found is not None and leaf is not None:
                places[path] = found
            elif leaf is not None:
                lost.append(path + " (hidden as a whole)" * _trees.is_hole(leaf))

        _trees.map_with_paths(find, params, holes=True)
        if lost:
            raise ValueError(
                "`params` must have a number or a known name in every path, got "
                f"{listed(lost)}. Name what is nearest the input in `stem`, what is "
                "above the blocks in `head`, or how blocks are numbered in `pattern`; "
                "mask the leaves of a subtree one by one."
            )
        blocks = {path: found for path, found in places.items() if found[0] == "block"}
        numbers = sorted({index for _, index, _ in blocks.values()})
        if number is None:
            _warn_of_separate_counts(blocks)
            _warn_of_a_single_number(blocks)
        first = int(any(where == "stem" for where, *_ in places.values()))
        top = first + len(numbers)
        depths = {index: first + rank for rank, index in enumerate(numbers)}
        last = top if final_norm == "head" else max(top - 1, 0)
        outside = {"stem": 0, "norm": last, "head": top}

        def depth(path: str, leaf: Any) -> Any:
            if leaf is None or _trees.is_hole(leaf):
                return leaf
            where, index, _ = places[path]
            return depths[index] if where == "block" else outside[where]

        return _trees.map_with_paths(depth, params, holes=True)

    return label_fn


_ADVICE = (
    "Give a `pattern`, `stem` or `head` if that is wrong; `describe_groups` shows the "
    "depths."
)


def _warn_of_separate_counts(blocks: dict[str, tuple[str, int, str]]) -> None:
    """Lists that count apart, ``Conv_0, Conv_1, Dense_0``; a list of norms may."""
    lists: dict[str, set[int]] = {}
    for _, index, before in blocks.values():
        lists.setdefault(before, set()).add(index)
    norms = {name for name in lists if re.search("norm|bn|ln", name.lower())}
    for (one, mine), (other, others) in itertools.combinations(lists.items(), 2):
        beside = mine == others and {one, other} & norms
        if mine & others and not beside:
            warnings.warn(
                f"`params` number {one!r} and {other!r} separately ({sorted(mine)} and "
                f"{sorted(others)}), yet equal numbers get equal depths. {_ADVICE}",
                stacklevel=4,
            )
            return


def _warn_of_a_single_number(blocks: dict[str, tuple[str, int, str]]) -> None:
    """The number of a network, ``resnet50/layers/3``, is the first in every path."""
    if len({index for _, index, _ in blocks.values()}) > 1:
        return
    rest = {
        path[len(before) :].partition("/")[2]
        for path, (_, _, before) in blocks.items()
        if before
    }
    numbers = {int(n) for tail in rest for n in re.findall(r"(\d+)(?:/|$)", tail)[:1]}
    if len(numbers) > 1:
        (index,) = {index for _, index, _ in blocks.values()}
        warnings.warn(
            f"`params` have the number {index} before all others in every path, so "
            f"that there is one block; {sorted(numbers)} stand deeper. {_ADVICE}",
            stacklevel=4,
        )
