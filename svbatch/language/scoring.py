"""Closed answers are scored, none is generated: every label's log-probability for every segment, in one pass.

A question's labels form a trie of token ids whose root is the instruction's last token. The instruction and
the trie's inner nodes are read once, each node seeing the path to it and nothing else, and the tokens that
may follow a node are scored at that node. Several questions are packed into one pass; none sees another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svbatch.language.llm import Asked, LanguageModel, Prefix

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The instruction's token ids, and each label's, which end with the end of the turn."""

MAX_PACKED_TOKENS = 256
MAX_PACKED_POSITIONS = 4096
"""Questions share a pass up to so many tokens, and positions of all segments. Past that the matrix products are large
enough, and a question's tokens only pay for looking past the others'."""


def packed_tokens(num_segments: int) -> int:
    """Tokens of the questions that share a pass over so many segments."""
    return min(MAX_PACKED_TOKENS, MAX_PACKED_POSITIONS // num_segments)


@torch.inference_mode()
def score_labels(
    llm: LanguageModel, prefix: Prefix, instruction_ids: Sequence[int], labels: Sequence[Sequence[int]]
) -> Tensor:
    """Each label's log-probability after prefix and instruction, (B, num_labels) float32.

    Natural logarithm, summed over the label's tokens. The rest is as in `score_many`.
    """
    return score_many(llm, prefix, [(instruction_ids, labels)])[0]


@torch.inference_mode()
def score_many(llm: LanguageModel, prefix: Prefix, questions: Sequence[Question]) -> list[Tensor]:
    """`score_labels` of several questions, each asked of the prefix alone.

    The prefix can be asked again afterwards: what was added is dropped. Raises ValueError for an empty
    instruction or an empty label, TaskError where the LLM's context is too short.
    """
    scores: list[Tensor] = []
    if llm.shares_questions:
        trees = [_Tree.of(instruction_ids, labels) for instruction_ids, labels in questions]
        for pack in _packs(trees, packed_tokens(prefix.batch_size)):
            scores += _score_pack(llm, llm.ask(prefix, ()), pack)
    else:
        for instruction_ids, labels in questions:
            asked = llm.ask(prefix, instruction_ids)
            scores += _score_pack(llm, asked, [_Tree.of(asked.unread, labels)])
    return scores


@dataclass(frozen=True)
class _Tree:
    """One question: the tokens before an answer in a line, then the inner nodes of the labels' trie."""

    ids: list[int]
    """Token of each node, parents before children."""
    parents: list[int]
    """Node before each node; -1 for the first, which follows the prefix."""
    edges: dict[tuple[int, int], int]
    """(node, next token) -> number of that edge; the log-probability of an edge is read at its node."""
    paths: list[list[int]]
    """For each label the edges from the instruction's end to the label's last token."""

    @classmethod
    def of(cls, instruction_ids: Sequence[int], labels: Sequence[Sequence[int]]) -> "_Tree":
        if not instruction_ids:
            raise ValueError("the instruction has no tokens, so nothing comes right before the labels")
        ids = list(instruction_ids)
        parents = list(range(-1, len(ids) - 1))
        root = len(ids) - 1
        edges: dict[tuple[int, int], int] = {}
        nodes: dict[int, int] = {}  # edge -> the node it leads to, if anything follows it there
        paths: list[list[int]] = []
        for label_index, label in enumerate(labels):
            if not label:
                raise ValueError(f"label {label_index} has no tokens; it needs at least the end of the turn")
            node = root
            path: list[int] = []
            for step, token in enumerate(label, start=1):
                edge = edges.setdefault((node, token), len(edges))
                path.append(edge)
                if step < len(label):
                    if edge not in nodes:
                        nodes[edge] = len(ids)
                        ids.append(token)
                        parents.append(node)
                    node = nodes[edge]
            paths.append(path)
        return cls(ids, parents, edges, paths)


def _packs(trees: Sequence[_Tree], max_tokens: int) -> list[list[_Tree]]:
    """The trees in order, in packs of at most `max_tokens`; a larger tree is a pack of its own."""
    packs: list[list[_Tree]] = []
    room = 0
    for tree in trees:
        if len(tree.ids) > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(tree)
        room -= len(tree.ids)
    return packs


def _score_pack(llm: LanguageModel, asked: Asked, trees: Sequence[_Tree]) -> list[Tensor]:
    ids = torch.tensor([token for tree in trees for token in tree.ids], device=llm.device)
    visible, depths = _see_own_path(trees)
    hidden = llm.extend(
        asked.cache,
        asked.lengths,
        llm.embed(ids).expand(len(asked.lengths), -1, -1),
        depths=depths.to(llm.device),
        visible=visible.to(llm.device),
    )
    scores: list[Tensor] = []
    start = 0
    for tree in trees:
        of_edge = _edge_scores(llm, hidden[:, start : start + len(tree.ids)], tree.edges)
        scores.append(_sums_over_paths(of_edge, tree.paths))
        start += len(tree.ids)
    return scores


def _see_own_path(trees: Sequence[_Tree]) -> tuple[Tensor, Tensor]:
    """What each of the packed trees' N nodes sees, itself and its ancestors, (N, N) bool; depths, (N,)."""
    num_tokens = sum(len(tree.ids) for tree in trees)
    visible = torch.eye(num_tokens, dtype=torch.bool)
    start = 0
    for tree in trees:
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                visible[start + node] |= visible[start + parent]
        start += len(tree.ids)
    return visible, visible.sum(1) - 1


def _edge_scores(llm: LanguageModel, hidden: Tensor, edges: Iterable[tuple[int, int]]) -> Tensor:
    """Log-probability of each (node, token) after that node of (B, N, E), (B, num_edges) float32."""
    of_node, tokens = torch.tensor(list(edges), dtype=torch.int64, device=llm.device).view(-1, 2).unbind(1)
    nodes, of_used = torch.unique(of_node, return_inverse=True)
    used = hidden[:, nodes]
    return llm.token_logits(used[:, of_used], tokens) - llm.normaliser(used)[:, of_used]


def _sums_over_paths(edge_scores: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
    """(B, num_edges) -> (B, num_labels): the sum of each label's edges."""
    on_path = edge_scores.new_zeros(len(paths), edge_scores.shape[1])
    label_of = [label for label, path in enumerate(paths) for _ in path]
    edge_of = [edge for path in paths for edge in path]
    on_path[label_of, edge_of] = 1
    return edge_scores @ on_path.T
