"""What happens to every site, decided before anything is done."""
