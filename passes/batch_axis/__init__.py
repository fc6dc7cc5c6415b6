"""Which dimension of every value is the sample: the static check that samples do not mix."""
