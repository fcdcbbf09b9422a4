"""How strong the trained change may be: chosen after training, on rows that training did not see."""
