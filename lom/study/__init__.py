"""Problems whose answers are known exactly, and the experiments that hold LOM against them.

`tabular`, `quadratic` and `linear_quadratic` give the answers; `experiments` trains on sampled data and compares;
`lom-study` (`lom.study.main`) runs the experiments at full size and draws them.
"""
