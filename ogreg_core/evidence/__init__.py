"""Controlled comparisons: many trainings on equal terms, and what they show."""
