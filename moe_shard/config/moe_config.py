"""Configure the MoE layer: its router, its experts, and how tokens are dispatched to them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import MOST_SIZE, Key, check_leaves, divisors
from moe_shard.config.strategies import check_strategy_name
from moe_shard.errors import UserError

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
    """Describe how a token's experts are chosen and weighted.

    >>> import moe_shard as ms
    >>> router = ms.RouterConfig(  # as in DeepSeek-V3
    ...     routed_score_func="sigmoid", routed_bias=True, routed_scaling_factor=2.5,
    ...     n_routing_groups=8, topk_routing_group=4,
    ... )
    >>> config = ms.MoEConfig(
    ...     num_experts=256, num_experts_per_tok=8, moe_mlp_dim=2048, router=router
    ... )
    >>> config.router.groups
    (8, 4)

    Attributes:
        routed_score_func: scores of the logits over all experts: a `ScoreFunction`. "sparsemixer"
            chooses one expert after the other, each weighted by a softmax over the logits near it
            (Phi-3.5-MoE, SparseMixer-v2, arXiv 2409.12136).
        router_norm: whether logits are of the input over its root mean square, times a learned
            vector, over the root of the model dim (Gemma 4).
        router_bias: whether the logits have a learned bias.
        routed_bias: whether a bias is added to the scores by which experts are chosen, but not to
            the combine weights (arXiv 2408.15664); no gradient reaches it.
        routed_bias_update_rate: how much that bias is moved after each update: up for experts below
            the mean load, down for those above it; 0: not at all.
        n_routing_groups: groups of consecutive experts; -1: one group.
        topk_routing_group: groups that a token may choose experts from; -1: all.
        routing_group_score: how groups are ranked, a `GroupScore`: by their best expert
            (DeepSeek-V2) or by the sum of their best two (DeepSeek-V3).
        norm_topk_prob: whether a token's K combine weights are divided by their sum.
        norm_topk_epsilon: number added to that sum.
        routed_scaling_factor: factor of the combine weights, after that.
        router_expert_scale: whether each expert's combine weights, after that, have a learned
            factor of their own.
        routed_score_on_input: whether the combine weights multiply the experts' input, not their
            output (Llama 4).
        load_balance_probs: probabilities in the load-balance loss, a `BalanceProbs`: each score
            over the sum of its token's scores, or a softmax of the scores, of the scores with
            `routed_bias`, or of the logits.
        sparsemixer_jitter: sparsemixer: logits within twice this fraction of the best one take part
            in its softmax.
        force_load_balance: whether experts are assigned round-robin, for benchmarks.
        use_random_routing: whether experts are chosen at random, for benchmarks.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    routed_score_func: Annotated[ScoreFunction, Key(choices=get_args(ScoreFunction))] = "softmax"
    router_norm: Annotated[bool, Key()] = False
    router_bias: Annotated[bool, Key()] = False
    routed_bias: Annotated[bool, Key()] = False
    routed_bias_update_rate: Annotated[float, Key(least=0)] = 0.0
    n_routing_groups: Annotated[int, Key(least=1, off=-1)] = -1
    topk_routing_group: Annotated[int, Key(least=1, off=-1)] = -1
    routing_group_score: Annotated[GroupScore, Key(choices=get_args(GroupScore))] = "top2_sum"
    norm_topk_prob: Annotated[bool, Key()] = True
    norm_topk_epsilon: Annotated[float, Key(least=0)] = 0.0
    routed_scaling_factor: Annotated[float, Key(above=0)] = 1.0
    router_expert_scale: Annotated[bool, Key()] = False
    routed_score_on_input: Annotated[bool, Key()] = False
    load_balance_probs: Annotated[BalanceProbs, Key(choices=get_args(BalanceProbs))] = "scores"
    sparsemixer_jitter: Annotated[float, Key(least=0, below=0.5)] = 0.01
    force_load_balance: Annotated[bool, Key()] = False
    use_random_routing: Annotated[bool, Key()] = False

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.force_load_balance and self.use_random_routing:
            raise UserError(
                "force_load_balance=true and use_random_routing=true: experts are assigned "
                "round-robin or at random, not both\nfix: one of the two"
            )
        if self.routed_bias_update_rate and not self.routed_bias:
            raise UserError(
                f"routed_bias_update_rate={self.routed_bias_update_rate:g} moves a bias that "
                "is not there\nfix: routed_bias=true"
            )

    @property
    def groups(self) -> tuple[int, int]:
        """Return the number of expert groups, and how many of them a token may choose from."""
        groups = max(self.n_routing_groups, 1)
        return groups, groups if self.topk_routing_group == -1 else self.topk_routing_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Describe a model's MoE layer; attributes are keys of the YAML (MaxText's, without `base_`).

    >>> import moe_shard as ms
    >>> config = ms.MoEConfig(num_experts=8, num_experts_per_tok=2, moe_mlp_dim=512)
    >>> config.moe_dispatch, config.capacity_factor  # gather, with a slot for every token
    ('gather', -1.0)
    >>> ms.MoEConfig(num_experts=8, num_experts_per_tok=9, moe_mlp_dim=512)
    Traceback (most recent call last):
    moe_shard.errors.UserError: num_experts_per_tok=9 is more than num_experts=8: ...

    Attributes:
        num_experts: E, experts in each MoE layer.
        num_experts_per_tok: K, experts that each token is routed to.
        moe_mlp_dim: H, hidden size of one expert.
        moe_latent_dim: size of the latent of a token that experts take in and give, and that is
            exchanged; -1: the token itself, of the model dim.
        shared_experts: number of experts that process every token; they are one MLP.
        shared_expert_mlp_dim: hidden size of that MLP; -1: `shared_experts` times H.
        shared_expert_gate: whether that MLP's output is multiplied by the sigmoid of a learned
            score of the token.
        routed_norms: whether router and routed experts read the residual stream itself, the experts
            through a norm of their own, and the outputs of routed and of shared experts are
            normalised, each by its own, before they are added (Gemma 4).
        capacity_factor: slots per expert over those of a balanced load; 0 or less: as many slots as
            the sequence has tokens, so that nothing is dropped.
        capacity_rule: how the number of slots is rounded, a `CapacityRule`.
        min_capacity: fewest slots that an expert has for a sequence.
        drop_policy: which choices an overfull expert keeps, a `DropPolicy`.
        moe_dispatch: name of a registered strategy, see `config.strategies`.
        ragged_transport: how `ragged` exchanges token copies, a `RaggedTransport`.
        ragged_buffer_factor: token copies that `ragged` can receive, over those of a balanced load;
            it drops what is beyond. -1: it never drops.
        grouped_product: how `ragged` multiplies token copies by their experts' weights, a
            `GroupedProductName`.
        num_moe_token_chunks: chunks that a layer's tokens are exchanged in, so that one chunk's
            exchange is overlapped with another's experts.
        prefuse_moe_weights: whether gate and up are one parameter and one product.
        moe_dispatch_no_expert_sharding: the flag: the dispatched batch dim is not sharded over the
            expert axes (rule `activation_batch_no_exp`), so that tokens move by AllToAll.
        load_balance_loss_weight: factor of the load-balance loss in the training loss.
        load_balance_loss_type: normalisation of that loss, a `LoadBalanceLoss`.
        router_z_loss_weight: factor of the mean squared log-sum-exp of the router's logits.
        router: how experts are chosen and weighted.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    num_experts: Annotated[int, Key(least=1, most=MOST_EXPERTS)] = 1
    num_experts_per_tok: Annotated[int, Key(least=1)] = 1
    moe_mlp_dim: Annotated[int, Key("base_moe_mlp_dim", least=1, most=MOST_SIZE)] = -1
    moe_latent_dim: Annotated[int, Key(least=1, most=MOST_SIZE, off=-1)] = -1
    shared_experts: Annotated[int, Key(least=0)] = 0
    shared_expert_mlp_dim: Annotated[int, Key(least=1, most=MOST_SIZE, off=-1)] = -1
    shared_expert_gate: Annotated[bool, Key()] = False
    routed_norms: Annotated[bool, Key()] = False
    capacity_factor: Annotated[float, Key()] = -1.0
    capacity_rule: Annotated[CapacityRule, Key(choices=get_args(CapacityRule))] = "maxtext"
    min_capacity: Annotated[int, Key(least=0)] = 0
    drop_policy: Annotated[DropPolicy, Key(choices=get_args(DropPolicy))] = "position"
    moe_dispatch: Annotated[str, Key()] = "gather"
    ragged_transport: Annotated[RaggedTransport, Key(choices=get_args(RaggedTransport))] = "auto"
    ragged_buffer_factor: Annotated[float, Key(above=0, off=-1)] = -1.0
    grouped_product: Annotated[GroupedProductName, Key(choices=get_args(GroupedProductName))] = (
        "auto"
    )
    num_moe_token_chunks: Annotated[int, Key(least=1, most=2**16)] = 1
    prefuse_moe_weights: Annotated[bool, Key()] = False
    moe_dispatch_no_expert_sharding: Annotated[bool, Key()] = False
    load_balance_loss_weight: Annotated[float, Key(least=0)] = 0.01
    load_balance_loss_type: Annotated[LoadBalanceLoss, Key(choices=get_args(LoadBalanceLoss))] = (
        "maxtext"
    )
    router_z_loss_weight: Annotated[float, Key(least=0)] = 0.0
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        check_leaves(self)
        check_strategy_name(self.moe_dispatch)
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}: a token cannot go to an expert twice\n"
                f"fix: num_experts_per_tok from 1 to {self.num_experts}"
            )
        self._check_groups()
        if self.shared_expert_gate and not self.shared_experts:
            raise UserError(
                "shared_expert_gate=true, but there is no shared expert\nfix: shared_experts=1"
            )

    def _check_groups(self) -> None:
        groups, allowed = self.router.groups
        if self.num_experts % groups:
            raise UserError(
                f"num_experts={self.num_experts} does not split into n_routing_groups={groups}\n"
                f"fix: one of {divisors(self.num_experts)}"
            )
        if allowed > groups:
            raise UserError(
                f"topk_routing_group={allowed} is more than n_routing_groups={groups}\n"
                f"fix: topk_routing_group from 1 to {groups}"
            )
        size = self.num_experts // groups
        if allowed < groups and self.router.routing_group_score == "top2_sum" and size == 1:
            raise UserError(
                f"routing_group_score=top2_sum: n_routing_groups={groups} leaves one expert a "
                "group, which has no best two\nfix: routing_group_score=max, or fewer groups"
            )
        if size * allowed < self.num_experts_per_tok:
            raise UserError(
                f"topk_routing_group={allowed} groups of {size} experts are fewer than "
                f"num_experts_per_tok={self.num_experts_per_tok}\n"
                f"fix: topk_routing_group={-(-self.num_experts_per_tok // size)} or more"
            )

    def expert_dim(self, model_dim: int) -> int:
        """Return the size of what an expert takes in and gives: of the latent, if there is one."""
        return model_dim if self.moe_latent_dim == -1 else self.moe_latent_dim

    def dispatched(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is dispatched of tokens [B S M]."""
        return (*tokens[:-1], self.expert_dim(tokens[-1]))

    @property
    def shared_dim(self) -> int:
        """Return the hidden size of the shared experts' MLP; 0 where there is none."""
        if self.shared_experts and self.shared_expert_mlp_dim != -1:
            return self.shared_expert_mlp_dim
        return self.shared_experts * self.moe_mlp_dim
