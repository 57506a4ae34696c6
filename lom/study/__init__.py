"""Problems whose answers are known exactly, and the experiments that hold LOM against them.

`tabular`, `quadratic`, `linear_quadratic` and `hyper_policies` give the answers; `experiments` and `checks` train on
sampled data and compare; `cells` keeps what was measured, `reports` and `plots` show it; `lom-study` (`lom.study.main`)
is the program.
"""
