"""Tell the dims apart where a layer's experts are one tensor, with gate, if any, and up in one."""

from __future__ import annotations

from typing import NamedTuple

from moe_shard.autoep.tensor_plan import Layout
from moe_shard.config.keys import shown
from moe_shard.errors import UserError


class Fused(NamedTuple):
    """Describe how a layer's experts are stored.

    Attributes:
        experts: E, number of experts.
        model_dim: M, the model dim.
        hidden_dim: H, hidden size of one expert.
        gate_up_first: whether the layout is [E, 2H, M] and [E, M, H], as in `nn.Linear`; else [E,
            M, 2H] and [E, H, M].
        interleaved: whether even entries of the fused dim are gate and odd ones up; else it has two
            halves.
        gate: whether there is a gate; without one, 2H is H.
    """

    experts: int
    model_dim: int
    hidden_dim: int
    gate_up_first: bool
    interleaved: bool
    gate: bool = True

    @property
    def words(self) -> str:
        """Return the dims in words, for a report."""
        if not self.gate:
            return "[E H M] and [E M H]" if self.gate_up_first else "[E M H] and [E H M]"
        order = "[E 2H M] and [E M H]" if self.gate_up_first else "[E M 2H] and [E H M]"
        return f"{order}, {'gate and up in turn' if self.interleaved else 'gate, then up'}"

    def part(self, name: str) -> slice:
        """Return the part of the fused dim that holds gate or up."""
        if not self.gate:
            return slice(None)
        if self.interleaved:
            return slice(int(name == "up"), None, 2)
        return slice(0, self.hidden_dim) if name == "gate" else slice(self.hidden_dim, None)

    def layout(self, name: str) -> Layout:
        """Return the layout of gate, up or down as [E in out]."""
        order = (0, 2, 1) if self.gate_up_first else ()
        if name == "down":
            return Layout(order=order)
        before = 1 if self.gate_up_first else 2
        return Layout(take=(*(slice(None),) * before, self.part(name)), order=order)

    def bias_layout(self, name: str) -> Layout:
        """Return the layout of the bias of gate, up or down as [E out]."""
        return Layout() if name == "down" else Layout(take=(slice(None), self.part(name)))


def read_fused(
    gate_up: tuple[int, ...],
    down: tuple[int, ...],
    *,
    interleaved: bool,
    where: str,
    gate: bool = True,
) -> Fused:
    """Tell the layout from the two shapes.

    Args:
        gate_up: shape of the tensor with gate and up, or up alone.
        down: shape of the tensor with the down projections.
        interleaved: the family's setting.
        where: the tensors, for messages.
        gate: whether there is a gate.

    Raises:
        UserError: the shapes fit neither layout.
    """
    if len(gate_up) == len(down) == 3:
        experts, rows, columns = gate_up
        for first, both, dim in ((True, rows, columns), (False, columns, rows)):
            hidden = both // (1 + gate)
            back = (experts, dim, hidden) if first else (experts, hidden, dim)
            if both == hidden * (1 + gate) and down == back:
                return Fused(experts, dim, hidden, first, interleaved, gate)
    raise UserError(
        f"{where}: shapes {shown(gate_up)} and {shown(down)} are neither [E 2H M] with [E M H] nor "
        f"[E M 2H] with [E H M]{'' if gate else ', where 2H is H without a gate'}\n"
        "fix: expert_w1 and expert_w2 of hf_family name other tensors"
    )
