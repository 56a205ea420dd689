import java.io.IOException;
import java.nio.file.FileVisitResult;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.Path;
import java.nio.file.SimpleFileVisitor;
import java.nio.file.StandardCopyOption;
import java.nio.file.attribute.BasicFileAttributes;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/** Copies, moves and deletes with several threads, as programs for the JVM do: copy|move|delete FROM [TO]. */
public final class Copier {
    private static final ExecutorService THREADS = Executors.newFixedThreadPool(4);

    public static void main(String[] arguments) throws Exception {
        Path from = Path.of(arguments[1]);
        try {
            switch (arguments[0]) {
                case "copy" -> copy(from, Path.of(arguments[2]));
                case "move" -> Files.move(from, Path.of(arguments[2]), StandardCopyOption.REPLACE_EXISTING);
                case "delete" -> delete(from);
                default -> throw new IllegalArgumentException(arguments[0]);
            }
        } catch (ExecutionException | IOException error) {
            System.err.println(error);
            System.exit(1);
        }
        THREADS.shutdown();
    }

    private static void copy(Path from, Path to) throws Exception {
        List<Callable<Path>> copies = new ArrayList<>();
        Files.walkFileTree(from, new SimpleFileVisitor<>() {
            @Override
            public FileVisitResult preVisitDirectory(Path dir, BasicFileAttributes attributes) throws IOException {
                Files.createDirectories(to.resolve(from.relativize(dir).toString()));
                return FileVisitResult.CONTINUE;
            }

            @Override
            public FileVisitResult visitFile(Path file, BasicFileAttributes attributes) {
                Path target = file.equals(from) ? to : to.resolve(from.relativize(file).toString());
                copies.add(() -> Files.copy(file, target, LinkOption.NOFOLLOW_LINKS,
                        StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.COPY_ATTRIBUTES));
                return FileVisitResult.CONTINUE;
            }
        });
        all(copies);
    }

    private static void delete(Path tree) throws Exception {
        List<Callable<Path>> files = new ArrayList<>();
        List<Path> directories = new ArrayList<>();
        Files.walkFileTree(tree, new SimpleFileVisitor<>() {
            @Override
            public FileVisitResult visitFile(Path file, BasicFileAttributes attributes) {
                files.add(() -> {
                    Files.delete(file);
                    return file;
                });
                return FileVisitResult.CONTINUE;
            }

            @Override
            public FileVisitResult postVisitDirectory(Path dir, IOException error) {
                directories.add(dir);
                return FileVisitResult.CONTINUE;
            }
        });
        all(files);
        for (Path dir : directories) {
            Files.delete(dir);
        }
    }

    private static void all(List<Callable<Path>> work) throws Exception {
        for (Future<Path> done : THREADS.invokeAll(work)) {
            done.get();
        }
    }
}
