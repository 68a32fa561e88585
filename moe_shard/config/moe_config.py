"""The MoE layer: its router, its experts, and how tokens get to them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import Key, check_leaves, divisors
from moe_shard.errors import UserError

DispatchStrategy = Literal["einsum", "gather", "ragged"]
RaggedTransport = Literal["auto", "ragged", "padded"]
GroupedProductName = Literal["auto", "ragged_dot", "tokamax", "pallas", "blocked"]
CapacityRule = Literal["maxtext", "gshard"]
DropPolicy = Literal["position", "probability"]
LoadBalanceLoss = Literal["maxtext", "sequence", "gshard", "huggingface"]
BalanceProbs = Literal["scores", "softmax", "ranked", "logits"]
ScoreFunction = Literal["softmax", "sigmoid", "sparsemixer"]
GroupScore = Literal["max", "top2_sum"]
MOST_EXPERTS = 2**16  # far above any model; keeps the divisors in a fix countable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token's experts are chosen and weighed.

    Attributes:
        score_func: a `ScoreFunction` of the logits, over all experts. "sparsemixer" takes one
            expert after the other, each weighed by a softmax over those near it (Phi-3.5-MoE,
            SparseMixer-v2, arXiv 2409.12136).
        bias: a learned bias in the logits.
        correction_bias: a bias that is added to the scores where experts are chosen, and never
            where they are weighed (arXiv 2408.15664); no gradient reaches it.
        correction_bias_update_rate: by how much it is moved after each update, up for experts with
            less than the mean load and down for those with more; 0: it stays.
        num_groups: groups of consecutive experts; -1: one group.
        kept_groups: groups that a token may choose from; -1: all.
        group_score: a `GroupScore`; what a group is chosen by: its best expert (DeepSeek-V2) or
            the sum of its best two (DeepSeek-V3).
        norm_topk_prob: the K weights of a token are divided by their sum.
        scaling_factor: of the weights, after that.
        score_on_input: the weights multiply what experts take in, not what they give (Llama 4).
        balance_probs: a `BalanceProbs`; what the load-balance loss takes for probabilities: each
            score over the sum of its token's, or a softmax: of the scores, of the scores with the
            bias that experts are chosen by, or of the logits.
        sparsemixer_jitter: how near the best logit others must be to share its softmax: within
            twice this part of it.
        force_load_balance: experts are dealt out in turn; for benchmarks.
        random: experts are chosen at random; for benchmarks.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    score_func: Annotated[ScoreFunction, Key("routed_score_func", choices=get_args(ScoreFunction))]
    bias: Annotated[bool, Key("router_bias")]
    correction_bias: Annotated[bool, Key("routed_bias")]
    correction_bias_update_rate: Annotated[float, Key("routed_bias_update_rate", least=0)]
    num_groups: Annotated[int, Key("n_routing_groups", least=1, off=-1)]
    kept_groups: Annotated[int, Key("topk_routing_group", least=1, off=-1)]
    group_score: Annotated[GroupScore, Key("routing_group_score", choices=get_args(GroupScore))]
    norm_topk_prob: Annotated[bool, Key("norm_topk_prob")]
    scaling_factor: Annotated[float, Key("routed_scaling_factor", above=0)]
    score_on_input: Annotated[bool, Key("routed_score_on_input")]
    balance_probs: Annotated[
        BalanceProbs, Key("load_balance_probs", choices=get_args(BalanceProbs))
    ]
    sparsemixer_jitter: Annotated[float, Key("sparsemixer_jitter", least=0, below=0.5)]
    force_load_balance: Annotated[bool, Key("force_load_balance")]
    random: Annotated[bool, Key("use_random_routing")]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.force_load_balance and self.random:
            raise UserError(
                "force_load_balance=true and use_random_routing=true: tokens are dealt out or "
                "scattered, not both\nfix: one of the two"
            )
        if self.correction_bias_update_rate and not self.correction_bias:
            raise UserError(
                f"routed_bias_update_rate={self.correction_bias_update_rate:g} moves a bias that "
                "is not there\nfix: routed_bias=true"
            )

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may choose from."""
        groups = max(self.num_groups, 1)
        return groups, groups if self.kept_groups == -1 else self.kept_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The MoE layer of a model.

    Attributes:
        num_experts: E, experts in each MoE layer.
        num_experts_per_tok: K, experts each token is sent to.
        mlp_dim: H, hidden size of one expert.
        shared_experts: experts beside them that every token passes, as one MLP.
        shared_mlp_dim: hidden size of that MLP; -1: `shared_experts` times H.
        shared_gate: its output is weighed by a sigmoid of a learned score of the token.
        capacity_factor: slots per expert over the slots of a perfect balance; 0 or less: as many
            slots as the row has tokens, so that nothing is dropped.
        capacity_rule: a `CapacityRule`; how the factor is rounded.
        min_capacity: fewest slots of an expert for a batch row.
        drop_policy: a `DropPolicy`; which choices an overfull expert keeps.
        dispatch: a `DispatchStrategy`.
        ragged_transport: a `RaggedTransport`; how `ragged` moves rows.
        ragged_buffer_factor: rows `ragged` can take in over those of a balanced load, beyond which
            it drops; -1: it never drops.
        grouped_product: a `GroupedProductName`; how `ragged` multiplies rows by experts' weights.
        num_token_chunks: parts of a layer's tokens that travel one by one.
        prefuse_weights: gate and up are one parameter and one product.
        no_expert_sharding: the flag: the dispatched batch dim leaves the expert axes alone.
        load_balance_loss_weight: factor of the load-balance loss in the training loss.
        load_balance_loss_type: a `LoadBalanceLoss`.
        router_z_loss_weight: factor of the mean squared log-sum-exp of the router's logits.
        router: how experts are chosen and weighed.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    num_experts: Annotated[int, Key("num_experts", least=1, most=MOST_EXPERTS)]
    num_experts_per_tok: Annotated[int, Key("num_experts_per_tok", least=1)]
    mlp_dim: Annotated[int, Key("base_moe_mlp_dim", least=1)]
    shared_experts: Annotated[int, Key("shared_experts", least=0)]
    shared_mlp_dim: Annotated[int, Key("shared_expert_mlp_dim", least=1, off=-1)]
    shared_gate: Annotated[bool, Key("shared_expert_gate")]
    capacity_factor: Annotated[float, Key("capacity_factor")]
    capacity_rule: Annotated[CapacityRule, Key("capacity_rule", choices=get_args(CapacityRule))]
    min_capacity: Annotated[int, Key("min_capacity", least=0)]
    drop_policy: Annotated[DropPolicy, Key("drop_policy", choices=get_args(DropPolicy))]
    dispatch: Annotated[DispatchStrategy, Key("moe_dispatch", choices=get_args(DispatchStrategy))]
    ragged_transport: Annotated[
        RaggedTransport, Key("ragged_transport", choices=get_args(RaggedTransport))
    ]
    ragged_buffer_factor: Annotated[float, Key("ragged_buffer_factor", above=0, off=-1)]
    grouped_product: Annotated[
        GroupedProductName, Key("grouped_product", choices=get_args(GroupedProductName))
    ]
    num_token_chunks: Annotated[int, Key("num_moe_token_chunks", least=1)]
    prefuse_weights: Annotated[bool, Key("prefuse_moe_weights")]
    no_expert_sharding: Annotated[bool, Key("moe_dispatch_no_expert_sharding")]
    load_balance_loss_weight: Annotated[float, Key("load_balance_loss_weight", least=0)]
    load_balance_loss_type: Annotated[
        LoadBalanceLoss, Key("load_balance_loss_type", choices=get_args(LoadBalanceLoss))
    ]
    router_z_loss_weight: Annotated[float, Key("router_z_loss_weight", least=0)]
    router: RouterConfig

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}: a token cannot go to an expert twice\n"
                f"fix: num_experts_per_tok from 1 to {self.num_experts}"
            )
        self._check_groups()
        if self.shared_gate and not self.shared_experts:
            raise UserError(
                "shared_expert_gate=true, but there is no shared expert\nfix: shared_experts=1"
            )

    def _check_groups(self) -> None:
        groups, kept = self.router.groups
        if self.num_experts % groups:
            raise UserError(
                f"num_experts={self.num_experts} does not split into n_routing_groups={groups}\n"
                f"fix: one of {divisors(self.num_experts)}"
            )
        if kept > groups:
            raise UserError(
                f"topk_routing_group={kept} is more than n_routing_groups={groups}\n"
                f"fix: topk_routing_group from 1 to {groups}"
            )
        size = self.num_experts // groups
        if kept < groups and self.router.group_score == "top2_sum" and size == 1:
            raise UserError(
                f"routing_group_score=top2_sum: n_routing_groups={groups} leaves one expert a "
                "group, which has no best two\nfix: routing_group_score=max, or fewer groups"
            )
        if size * kept < self.num_experts_per_tok:
            raise UserError(
                f"topk_routing_group={kept} groups of {size} experts are fewer than "
                f"num_experts_per_tok={self.num_experts_per_tok}\n"
                f"fix: topk_routing_group={-(-self.num_experts_per_tok // size)} or more"
            )

    @property
    def shared_dim(self) -> int:
        """Hidden size of the shared experts' MLP; 0 where there is none."""
        if self.shared_experts and self.shared_mlp_dim != -1:
            return self.shared_mlp_dim
        return self.shared_experts * self.mlp_dim
