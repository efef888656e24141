
#ifndef NO_MAIN
#include <stdio.h>
#include <stdlib.h>
static unsigned char weights[WEIGHTS + 64] __attribute__((aligned(64))), image[HEIGHT * WIDTH * 3 + 64] __attribute__((aligned(64)));
static float boxes[CANDIDATES][4], scores[CANDIDATES][CLASSES];
struct object { int at, label; float score; };

static int by_score(const void *a, const void *b) {
  float x = ((const struct object *)a)->score, y = ((const struct object *)b)->score;
  return (x < y) - (x > y);
}

static float overlap(const float *a, const float *b) {
  float w = (a[2] < b[2] ? a[2] : b[2]) - (a[0] > b[0] ? a[0] : b[0]), h = (a[3] < b[3] ? a[3] : b[3]) - (a[1] > b[1] ? a[1] : b[1]);
  if (w <= 0 || h <= 0) return 0;
  return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h);
}

static int fill(const char *path, const char *mode, unsigned char *to, size_t size) {
  int width, height, most;
  FILE *file = fopen(path, "rb");
  if (!file) return fprintf(stderr, "%s: cannot be opened\n", path), 2;
  if (*mode == 'p' && (fscanf(file, "P6 %d %d %d", &width, &height, &most) != 3 || width != WIDTH || height != HEIGHT || most != 255 || fgetc(file) < 0))
    return fprintf(stderr, "%s: give a picture of %dx%d in the binary PPM format, without comments\n", path, WIDTH, HEIGHT), 2;
  size_t got = fread(to, 1, size, file);
  fclose(file);
  return got == size ? 0 : (fprintf(stderr, "%s: ends too early\n", path), 2);
}

/* PICTURE.ppm [WEIGHTS.bin] [THRESHOLD]: a line of class, score and x1 y1 x2 y2 in pixels for each object, best first */
int main(int count, char **words) {
  if (count < 2) return fprintf(stderr, "%s PICTURE.ppm [WEIGHTS.bin] [THRESHOLD]\n", words[0]), 2;
  float least = count > 3 ? atof(words[3]) : 0.3f;
  if (fill(words[1], "picture", image, HEIGHT * WIDTH * 3) || fill(count > 2 ? words[2] : WEIGHTS_FILE, "weights", weights, WEIGHTS)) return 2;
  run(weights, image, &boxes[0][0], &scores[0][0]);
  static struct object found[CANDIDATES * CLASSES];
  int n = 0, kept = 0;
  for (int i = 0; i < CANDIDATES; i++)
    for (int k = 0; k < CLASSES; k++) if (scores[i][k] > least) found[n++] = (struct object){ i, k, scores[i][k] };
  qsort(found, n, sizeof *found, by_score);
  for (int i = 0; i < n; i++) {
    int drop = 0;
    for (int j = 0; j < kept && !drop; j++) drop = found[j].label == found[i].label && overlap(boxes[found[j].at], boxes[found[i].at]) > OVERLAP;
    if (drop) continue;
    found[kept++] = found[i];
    const float *b = boxes[found[kept - 1].at];
    printf("%d %.4f %.2f %.2f %.2f %.2f\n", found[kept - 1].label, found[kept - 1].score, b[0], b[1], b[2], b[3]);
  }
  return 0;
}
#endif
