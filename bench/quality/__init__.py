"""The accuracy study: does one per cent of the weights learn as well as LoRA and dense fine-tuning?

    python -m bench.quality --small         # the whole pipeline in a small version, at most 20 minutes on 2 cores
    python -m bench.quality                 # the study; stop it at any time, it goes on where it was
    python -m bench.quality --summary       # tables of what there is

`tasks.py` has the data, `likelihood.py` scores labels, `methods.py` makes a model trainable, `training.py` trains it,
`hypotheses.py` says what is compared, `plan.py` in which order and at which rate, `store.py` keeps the finished runs in
one CSV, `report.py` makes tables and plots of them. docs/quality.md has the findings.
"""
