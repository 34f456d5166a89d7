"""Many adapters on one frozen base, in training and in serving.

Training: `bank.py` holds the stacked adapters of K slots, `adapted_linear.py` puts them on one linear layer,
`groups.py` assigns tokens to slots, and `grouped.py` has the products, each fast one beside its plain reference.
Serving: `served_adapter.py` folds one adapter into constants, `served_bank.py` computes many of them in one forward;
`compiled.py` has its kernels for a CPU, and on CUDA adapters are in the table of `slot_table.py`, by the groups of
`linear_groups.py`. `plain_lora.py` writes an adapter as plain LoRA for engines that know only that.
"""
