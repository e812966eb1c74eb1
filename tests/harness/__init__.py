"""What tests run the product on in place of hardware that is not at hand."""
