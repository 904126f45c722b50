"""What leaves the network, and when: the state between two layers, selectors, and the policies that decide."""
