"""Attacks, defences, certificates, fooling images, corruptions, and the audit that makes their figures believable.

threat holds what all of them speak; objectives what attacks maximise.
"""
