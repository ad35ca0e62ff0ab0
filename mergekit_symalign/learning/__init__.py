"""Learning an alignment: gradient descent on the numbers of group elements alone, which cannot change a function."""
