"""Quality and cost of a trained model at each budget K."""
