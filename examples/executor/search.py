"""scikit-learn's search for the best of eight classifiers, with the cross-validation of each classifier on the grid."""

import joblib
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier

import batchlab.client.joblib  # registers the backend
from batchlab import Grid


def search() -> GridSearchCV:
    choices = {"n_neighbors": [1, 5, 9, 13], "weights": ["uniform", "distance"]}
    flowers = load_iris()
    return GridSearchCV(KNeighborsClassifier(), choices, cv=5, n_jobs=-1).fit(flowers.data, flowers.target)


if __name__ == "__main__":
    with Grid("local") as grid, joblib.parallel_config(batchlab.client.joblib.NAME, grid=grid):
        found = search()
    print(found.best_params_, f"{found.best_score_:.3f}")
