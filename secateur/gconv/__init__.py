"""Group convolutions: from masks made of groups of channels to convolutions with groups.

`permutation` finds the groups of outputs and inputs of one convolution that keep the most
importance. `search` assigns a number of groups to every convolution within a budget, and `config`
reads and writes files of such numbers. `conversion` replaces masked convolutions by group
convolutions between permutations of channels. The pruner itself is `pruners.gconv`.
"""
