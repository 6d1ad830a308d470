"""Closed answers are scored, none is generated: every label's log-probability for every segment, in one pass.

A question's labels form a trie of token ids whose root is the instruction's last token. The instruction and
the trie's inner nodes are read once, each node seeing the path to it and nothing else, and the tokens that
may follow a node are scored at that node. Several questions are packed into one pass; none sees another, but
tokens that they begin with alike are read once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from svbatch.language.llm import Asked, LanguageModel, Prefix
from svbatch.language.new_tokens import NewTokens

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
        for forest in _packs(questions, packed_tokens(prefix.batch_size)):
            scores += _score_pack(llm, llm.ask(prefix, ()), forest)
    else:
        for instruction_ids, labels in questions:
            asked = llm.ask(prefix, instruction_ids)
            scores += _score_pack(llm, asked, _Forest([(asked.unread, labels)]))
    return scores


class _Forest:
    """The tokens that are read to score several questions: the instructions, then the inner nodes of their labels'
    tries. Questions that begin with the same tokens share these nodes."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.ids: list[int] = []
        """Token of each node, parents before children."""
        self.parents: list[int] = []
        """Node before each node; -1 for those that follow the prefix."""
        self.edges: dict[tuple[int, int], int] = {}
        """(node, next token) -> number of that edge; the log-probability of an edge is read at its node."""
        self._nodes: dict[tuple[int, int], int] = {}
        self.paths = [self._paths(instruction_ids, labels) for instruction_ids, labels in questions]
        """For each question's labels the edges from the instruction's end to the label's last token."""

    def _paths(self, instruction_ids: Sequence[int], labels: Sequence[Sequence[int]]) -> list[list[int]]:
        if not instruction_ids:
            raise ValueError("the instruction has no tokens, so nothing comes right before the labels")
        root = -1
        for token in instruction_ids:
            root = self._node(root, token)
        return [self._path(root, index, label) for index, label in enumerate(labels)]

    def _path(self, root: int, index: int, label: Sequence[int]) -> list[int]:
        if not label:
            raise ValueError(f"label {index} has no tokens; it needs at least the end of the turn")
        nodes = [root]
        for token in label[:-1]:
            nodes.append(self._node(nodes[-1], token))
        return [self.edges.setdefault(edge, len(self.edges)) for edge in zip(nodes, label, strict=True)]

    def _node(self, parent: int, token: int) -> int:
        node = self._nodes.setdefault((parent, token), len(self.ids))
        if node == len(self.ids):
            self.ids.append(token)
            self.parents.append(parent)
        return node


def _packs(questions: Sequence[Question], max_tokens: int) -> list[_Forest]:
    """The questions in order, in forests of at most `max_tokens` nodes; a larger question is one of its own."""
    packs: list[list[Question]] = []
    for question in questions:
        if packs and len(_Forest([*packs[-1], question]).ids) <= max_tokens:
            packs[-1].append(question)
        else:
            packs.append([question])
    return [_Forest(together) for together in packs]


def _score_pack(llm: LanguageModel, asked: Asked, forest: _Forest) -> list[Tensor]:
    num_rows = len(asked.lengths)
    visible, depths = _see_own_path(forest.parents)
    ids = torch.tensor(forest.ids).repeat(num_rows)
    new = NewTokens.alike(num_rows, depths.to(llm.device), visible.to(llm.device))
    hidden = new.by_row(llm.extend(asked.cache, asked.lengths, llm.embed(ids), new))
    of_edge = _edge_scores(llm, hidden, forest.edges)
    return [_sums_over_paths(of_edge, paths) for paths in forest.paths]


def _see_own_path(parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What each of N nodes sees, itself and its ancestors, (N, N) bool; depths, (N,)."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
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
