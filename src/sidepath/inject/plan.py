"""Temporary alias until the callers import `sidepath.store.plan`."""
from sidepath.store.plan import Plan as Plan, plan as plan
