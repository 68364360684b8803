"""Small policies that were really trained, with a known cause: material to try attributions on.

Nothing is imported here, so that `tdhook_like` itself stays free of torchrl and gymnasium.

* `cartpole`: CartPole with two distractor keys, and the ground truth of which keys matter;
* `policy`: the actor and the critic for it, with shipped weights (`train_cartpole` made them);
* `memory`: an LSTM that must remember a cue, trained on the spot in seconds.
"""
