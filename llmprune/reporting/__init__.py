"""One page that shows what was done and how well it went."""
