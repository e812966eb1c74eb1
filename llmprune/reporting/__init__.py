"""The page that shows what was done and how well it went, and the page to try models on."""
