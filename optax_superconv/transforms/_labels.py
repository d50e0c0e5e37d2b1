"""Which group does a parameter belong to?

A label for each leaf of the parameters, as ``optax.partition`` takes them: from regular
expressions on the leaf's path, or its depth in the network.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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
    one = not isinstance(patterns, list | tuple | set | frozenset)
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
    rules = _checks.items("rules", rules, "pairs of an expression and a label")
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


def _place(name: str, is_leaf: bool, numbers: bool) -> tuple[str, int] | None:
    """What a name says about depth: a stem, a head, a final norm, or a number."""
    word = name.lower()
    if word == "cls" and not is_leaf:  # A token in vision, BERT's head in language.
        return "head", 0
    if re.fullmatch(_HEAD, word):
        return "head", 0
    if re.fullmatch(rf"({_STEM})(_\d+)?", word):
        return "stem", 0
    if numbers and (numbered := re.fullmatch(_NUMBERED, word)):
        return "block", int(numbered[1])
    return ("norm", 0) if re.fullmatch(_NORM, word) else None


class _Place(NamedTuple):
    """What a path says about depth."""

    where: str  # stem, block, norm or head
    index: int = 0  # of the block
    before: str = ""  # the number, up to the root
    rest: str = ""  # of the path, behind the number


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

    One numbered stack is read. Two that count on their own (an encoder and a decoder,
    two towers, ``Conv_0`` and ``Conv_1`` beside ``Dense_0``) are an error, since equal
    numbers would get equal depths; norms that are numbered like the layers beside them
    are not. A ``pattern`` then finds the stack, and ``stem`` and ``head`` say where the
    others belong. Check the result with :func:`describe_groups`: names can mislead.

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
        known name, if there are several stacks, or if all blocks have one number and
        others stand deeper (``resnet50/layers/3``). The message lists what was found.

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

    def place(path: str) -> _Place | None:
        names = ["/".join(begin) for begin in _trees.begins_of((*path.split("/"),))[1:]]
        for where, patterns in named.items():
            if any(p.fullmatch(begin) for p in patterns for begin in names):
                return _Place(where)
        if number is not None and (found := number.search(path)):
            digits = next((g for g in found.groups() if g and g.isdecimal()), None)
            if digits is not None:
                return _Place("block", int(digits))
        for begin in names:
            name = begin.rsplit("/", 1)[-1]
            if found_here := _place(name, begin == path, number is None):
                rest = path[len(begin) + 1 :]
                return _Place(*found_here, begin.rstrip("0123456789"), rest)
        return None

    def label_fn(params: optax.Params) -> Labels:
        places: dict[str, _Place] = {}
        lost: list[str] = []

        def find(path: str, leaf: Any) -> None:
            found = place(path)
            if found is not None and leaf is not None:
                places[path] = found
            elif leaf is not None:
                lost.append(path + " (hidden as a whole)" * _trees.is_hole(leaf))

        _trees.map_with_paths(find, params, holes=True)
        blocks = [found for found in places.values() if found.where == "block"]
        if number is None:
            _check_one_stack(blocks)
        if lost:
            raise ValueError(
                "`params` must have a number or a known name in every path, got "
                f"{listed(lost)}. Name what is nearest the input in `stem`, what is "
                "above the blocks in `head`, or how blocks are numbered in `pattern`; "
                "mask the leaves of a subtree one by one. (Layers that are stacked in "
                "one leaf have no numbers: `label_by_path` names them, and their "
                "multiplier is an array.)"
            )
        numbers = sorted({found.index for found in blocks})
        first = int(any(found.where == "stem" for found in places.values()))
        top = first + len(numbers)
        depths = {index: first + rank for rank, index in enumerate(numbers)}
        last = top if final_norm == "head" else max(top - 1, 0)
        outside = {"stem": 0, "norm": last, "head": top}

        def depth(path: str, leaf: Any) -> Any:
            if leaf is None or _trees.is_hole(leaf):
                return leaf
            found = places[path]
            is_block = found.where == "block"
            return depths[found.index] if is_block else outside[found.where]

        return _trees.map_with_paths(depth, params, holes=True)

    return label_fn


def _check_one_stack(blocks: list[_Place]) -> None:
    """Raises if lists count apart, or if all have a number before their own."""
    stacks: dict[str, set[int]] = {}
    for found in blocks:
        stacks.setdefault(found.before, set()).add(found.index)
    whole = {found.before for found in blocks if not found.rest}

    def is_beside(one: str, other: str) -> bool:
        """Norms that are numbered like their layers, or weights like their biases."""
        (parent, _, kind), (other_parent, _, other_kind) = (
            name.rstrip("/").rpartition("/") for name in (one, other)
        )
        norms = re.search(r"norm|bn|ln", f"{kind} {other_kind}".lower())
        same = parent == other_parent and stacks[one] == stacks[other]
        return same and (bool(norms) or {one, other} <= whole)

    apart = [
        pair
        for pair in itertools.combinations(stacks, 2)
        if stacks[pair[0]] & stacks[pair[1]] and not is_beside(*pair)
    ]
    if apart:
        several = sorted({name for pair in apart for name in pair})
        found_here = ", ".join(
            f"{name!r} with {listed(sorted(stacks[name]))}" for name in several[:8]
        )
        raise ValueError(
            "`params` must have one numbered stack, got several that count on their "
            f"own: {found_here}. Give the `pattern` of one, such as "
            f"{re.escape(several[0])}(\\d+), and name the others in `stem` or `head`; "
            "or give every group its label with `label_by_path`."
        )
    deeper = {
        int(number)
        for found in blocks
        for number in re.findall(r"(\d+)(?:/|$)", found.rest)[:1]
    }
    numbers = {found.index for found in blocks}
    if len(numbers) == 1 and len(deeper) > 1:
        raise ValueError(
            "`params` must have numbers that count blocks, got "
            f"{listed(numbers)} before all others in every path, and "
            f"{listed(sorted(deeper))} deeper. Give the `pattern` of those that count, "
            r"such as layers/(\d+), or rules to `label_by_path`."
        )
