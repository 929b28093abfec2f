"""Training: one adapter on a frozen base.

Takes: a recipe's adapter and training parts, a base, examples. Gives: an `Adapter` and the run's history.
Never: publishes (the caller does), moves a weight of the base, goes on after a loss that is not finite.
"""
