"""Attacks, defences, certificates, fooling images, corruptions, and the audit that makes their figures believable.

threat holds what all of them speak, objectives what attacks maximise, evaluate runs them on whole splits. Attacks:
  gradient         FGSM, N-FGSM, PGD, and noise as their control
  apgd, autoattack, eot      APGD without knobs; AutoAttack; networks that draw
  fab, square      the boundary followed; random squares, without gradients
  minimal          what those that look for the smallest change share: deepfool, ddn, fmn, carlini_wagner, ead
  decision, estimated        Boundary and HopSkipJump, from decisions alone; SPSA and NES, from logits alone
  universal, patch, spatial  one change for all images; a patch for any scene; turning and moving
Against them:
  defences         adversarial training, TRADES, MART, AWP, IBP and CROWN-IBP training, as losses
  bounds, smoothing          proofs: interval bounds, CROWN, alpha-CROWN; randomised smoothing
Besides:
  fooling          images of nothing that are classified with confidence
  corruptions, ood           fifteen common corruptions; scores of being unlike the training data
  audit            every result measured anew, and signs of masked gradients
"""
