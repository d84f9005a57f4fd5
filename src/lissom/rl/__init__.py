"""Learning from reward, as plug-ins to TRL: clips of the ratio, baselines of advantages, and small worlds for them.

`band` bounds each token's ratio by a trust region (BandPO), `value_prior` compares rewards with a prior and a few
rollouts together (V_0.5), `tree_search` finds what the policy alone would not, and learns from it. All are TRL's
GRPOTrainer with one more argument. `tasks` has problems whose graders a policy cannot harm, and a ledger counts what
every run spends.
"""
