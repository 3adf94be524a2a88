"""Who is near to whom, in bounded memory: exact nearest neighbours, k-reciprocal Jaccard distance, DBSCAN on it."""
