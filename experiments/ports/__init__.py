"""Two of Flax's published examples, each before and after it is tuned: the difference is what a port takes."""
