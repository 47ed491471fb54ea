"""Faults played against three candidates of one election, each an app with a server, from a seed; what they believed on
one boot clock, and the rules that it is checked by."""
